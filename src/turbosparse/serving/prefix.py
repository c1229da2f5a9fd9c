"""Finished texts, kept so that one that begins alike does not read its beginning again."""

from __future__ import annotations

from collections.abc import Iterable

from turbosparse.engine.engine import Engine
from turbosparse.engine.sequence import Sequence

_WORTH = 16  # tokens in common from which sharing a cache pays
_TAIL = 64  # tokens that a kept text may lose when another takes it over: one page of its cache


class Prefixes:
    """The kept texts of one engine, the least recently used first; they live in its budget."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._kept: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def bytes(self) -> int:
        return sum(sequence.reserved for sequence in self._kept)

    def start(self, tokens: list[int], running: Iterable[Sequence]) -> Sequence:
        """A sequence of these tokens, with the longest beginning in its cache that there is.

        A kept text that the tokens continue is taken over; of any other text, kept or `running`,
        the common beginning is shared.
        """
        found = max([*self._kept, *running], key=lambda text: shared(text, tokens), default=None)
        common = shared(found, tokens) if found else 0
        if found is None or common < _WORTH:
            return self._engine.sequence(tokens)
        room = self.make_room(self._engine.decoder.cache_bytes(common, 0), spare=found)
        kept = found in self._kept
        if kept:
            self._kept.remove(found)
        if kept and (found.length - common <= _TAIL or not room):
            sequence = found
        elif room:
            sequence = found.fork(common)
            self._kept += [found] if kept else []
        else:
            return self._engine.sequence(tokens)
        sequence.replace(tokens)
        return sequence

    def keep(self, sequence: Sequence) -> None:
        """Take a text that has ended; those that it continues are not needed any more."""
        sequence.truncate(sequence.length)
        longer = [*sequence.tokens, -1]
        for text in list(self._kept):
            if shared(text, longer) == text.length:
                self._free(text)
        if sequence.length < _WORTH:
            sequence.free()
        else:
            self._kept.append(sequence)

    def make_room(self, needed: int, spare: Sequence | None = None) -> bool:
        """Whether the budget has so many bytes left, after freeing kept texts where it must."""
        budget = self._engine.budget
        for text in list(self._kept):
            if budget.used + needed <= budget.limit:
                break
            if text is not spare:
                self._free(text)
        return budget.used + needed <= budget.limit

    def _free(self, text: Sequence) -> None:
        self._kept.remove(text)
        text.free()


def shared(text: Sequence, tokens: list[int]) -> int:
    """How many tokens of a text's cache are those of another, of which one is left to read."""
    end = min(text.length, len(tokens) - 1)
    pairs = zip(text.tokens, tokens, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if at == end or a != b), end)
