"""Speculation: guess the next tokens and check all guesses in one pass. Loads no torch.

A pass reads a weight row once for all its tokens, so checking a few guesses costs little more than
one token (Leviathan et al., 2023). The logits of a token do not depend on the pass that it is in,
and each token is chosen by the text's own sampler: a text is the same with and without guesses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from turbosparse.base.errors import TurboSparseError
from turbosparse.engine.engine import Engine
from turbosparse.engine.text import Tokenizer

LENGTHS = (0, 1, 3, 7)  # guesses that a pass checks
_FIRST = 3  # of them, to find out whether it pays
_ASKED_AGAIN = 64  # passes without guesses until one tries again
_MEMORY = 0.9  # of the moving averages
_LONGEST, _SHORTEST = 4, 2  # tokens that must have come before


class Guesser(Protocol):
    """Guesses how one text goes on."""

    def guess(self, tokens: list[int], count: int) -> list[int]:
        """At most `count` tokens that may follow these; none if it has no idea."""


class Lookup:
    """What followed when the text's last tokens came before (prompt lookup, Saxena 2023)."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}
        self._read = 0

    def guess(self, tokens: list[int], count: int) -> list[int]:
        for end in range(self._read + 1, len(tokens)):
            for size in range(_SHORTEST, min(_LONGEST, end) + 1):
                self._after[tuple(tokens[end - size : end])] = end
        self._read = max(self._read, len(tokens) - 1)
        for size in range(_LONGEST, _SHORTEST - 1, -1):
            if at := self._after.get(tuple(tokens[-size:])):
                period = len(tokens) - at  # the guess may reach into itself
                return [tokens[at + index % period] for index in range(count)]
        return []


class Ahead:
    """What a smaller model of the same vocabulary would write, greedily."""

    def __init__(self, engine: Engine):
        self._engine, self._sequence = engine, engine.sequence()

    def guess(self, tokens: list[int], count: int) -> list[int]:
        if len(tokens) + count > self._sequence.context:
            return []
        self._sequence.replace(tokens)
        found: list[int] = []
        while len(found) < count:
            [step] = self._engine.step([self._sequence])
            found.append(int(step.logits.argmax()))
            self._sequence.extend(found[-1:])
        return found


class Draft:
    """Who guesses for the texts of an engine, and how far ahead it pays.

    With a share p of guesses that hold, a pass that checks k of them writes
    (1 - p^(k+1)) / (1 - p) tokens (Leviathan et al., 2023, equation 1). The k is taken that writes
    most per second, by what passes took so far, the guessing included; 0 where none pays.

    Args:
        engine: of a smaller model that guesses; by default guesses are looked up in the text.
    """

    def __init__(self, engine: Engine | None = None):
        self._engine = engine
        self._seconds: dict[int, float] = {}  # of a pass, by the guesses that it checked
        self._held = self._checked = 0.0
        self._without = 0  # passes since guesses were checked
        self.passes = self.tokens = 0

    def guesser(self) -> Guesser:
        """For a new text."""
        return Ahead(self._engine) if self._engine else Lookup()

    @property
    def holds(self) -> float:
        """Share of the guesses that held of late."""
        return (self._held + 1) / (self._checked + 2)

    def __str__(self) -> str:
        return f"{self.tokens / max(1, self.passes):.2f} tokens a pass"

    def length(self) -> int:
        """How many tokens to guess for the next pass."""
        if 0 not in self._seconds:
            return 0
        if _FIRST not in self._seconds or self._without >= _ASKED_AGAIN:
            return _FIRST
        best = max(self._seconds, key=self._rate)
        return self._neighbour(best)

    def _rate(self, count: int) -> float:
        return sum(self.holds**power for power in range(count + 1)) / self._seconds[count]

    def _neighbour(self, best: int) -> int:
        """The best of the tried lengths, or once an untried one beside it."""
        if best == 0:
            return 0
        place = LENGTHS.index(best)
        return next((n for n in LENGTHS[place - 1 : place + 2] if n not in self._seconds), best)

    def note(self, count: int, held: int, seconds: float) -> None:
        """A pass checked so many guesses and took so long, and so many of them held."""
        self.passes, self.tokens = self.passes + 1, self.tokens + held + 1
        self._without = 0 if count else self._without + 1
        self._held = _MEMORY * self._held + held
        self._checked = _MEMORY * self._checked + min(count, held + 1)
        if count in LENGTHS:
            before = self._seconds.get(count, seconds)
            self._seconds[count] = _MEMORY * before + (1 - _MEMORY) * seconds


def open_draft(draft: str | Path, engine: Engine, tokenizer: Tokenizer) -> Draft | None:
    """Who guesses for this engine.

    Args:
        draft: ``auto`` or ``ngram`` looks guesses up in the text, ``off`` is none; else the packed
            folder of a smaller model.
        engine: whose texts they are.
        tokenizer: of the engine's model.

    Raises:
        TurboSparseError: it is no packed folder, or has another vocabulary.
    """
    if draft == "off":
        return None
    if draft in ("auto", "ngram"):
        return Draft()
    smaller = Engine(draft, threads=engine.threads)
    if Tokenizer(draft).vocabulary != tokenizer.vocabulary:
        raise TurboSparseError(
            f"--draft {draft}: its vocabulary is not that of {tokenizer.folder}; "
            "use a smaller model with the same tokenizer"
        )
    return Draft(smaller)
