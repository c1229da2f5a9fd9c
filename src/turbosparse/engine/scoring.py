"""How likely texts are: many continuations at once, what they have in common read once.

Texts with a common beginning share it by `Sequence.fork`, and texts of like length go through the
engine together. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from turbosparse.base.errors import TurboSparseError
from turbosparse.base.progress import track
from turbosparse.engine.cost import CHUNK
from turbosparse.engine.engine import Engine, Logits
from turbosparse.engine.sequence import Sequence as Kept

Item = TypeVar("Item")
Request = tuple[Sequence[int], Sequence[int]]  # a context and what continues it


class Score(NamedTuple):
    """Of a continuation: its log-probability in nats, and whether greedy decoding gives it."""

    log_probability: float
    greedy: bool


def log_probabilities(
    logits: Logits, targets: Sequence[int] | NDArray[np.int64]
) -> NDArray[np.float64]:
    """Natural log-probability of a target after each token, from ``[tokens, vocabulary]``."""
    best = logits.max(1, keepdims=True)
    total = np.log(np.exp(logits - best).sum(1, dtype=np.float64))
    found: NDArray[np.float64] = logits[np.arange(len(targets)), targets] - best[:, 0] - total
    return found


@dataclass
class _Text:
    """Tokens to read, and the requests that they answer: number, last target, length."""

    tokens: tuple[int, ...]
    requests: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def context(self) -> int:
        """Tokens after which no logits are needed."""
        return len(self.tokens) - max(length for _, _, length in self.requests)


@dataclass
class _Group:
    """Texts that begin with the same `shared` tokens, of which no logits are needed."""

    texts: list[_Text]
    shared: int

    @property
    def size(self) -> int:
        return self.shared + sum(len(text.tokens) - self.shared for text in self.texts)


def score(engine: Engine, requests: Sequence[Request], *, what: str = "scoring") -> list[Score]:
    """Score continuations; of a text longer than the model's context the end counts.

    Raises:
        TurboSparseError: an empty context or continuation, a continuation longer than the model's
            context, or a token that the model does not have.
    """
    groups = _groups(_texts(engine, requests))
    batches = _together(groups, lambda group: group.size, CHUNK)
    sums, greedy = np.zeros(len(requests)), np.ones(len(requests), bool)
    for batch in track(batches, what, total=len(batches)):
        for text, start, logits in _read(engine, batch):
            best = logits.argmax(1)
            for number, last, length in text.requests:
                at = max(0, len(text.tokens) - length - start)
                targets = np.array([*text.tokens[1:], last][start : start + len(logits)])[at:]
                sums[number] += log_probabilities(logits[at:], targets).sum()
                greedy[number] &= bool((best[at:] == targets).all())
    return [Score(float(one), bool(two)) for one, two in zip(sums, greedy, strict=True)]


def _texts(engine: Engine, requests: Iterable[Request]) -> list[_Text]:
    texts: dict[tuple[int, ...], _Text] = {}
    for number, (context, continuation) in enumerate(requests):
        if not 0 < len(continuation) <= engine.context or not context:
            raise TurboSparseError(
                f"request {number} has a context of {len(context)} and a continuation of "
                f"{len(continuation)} tokens; each must be 1 or more, and the continuation fit "
                f"the model's context of {engine.context}"
            )
        ids = engine.check_tokens([*context, *continuation])
        *tokens, last = ids[-engine.context - 1 :]
        text = texts.setdefault(tuple(tokens), _Text(tuple(tokens)))
        text.requests.append((number, last, len(continuation)))
    return sorted(texts.values(), key=lambda text: text.tokens)


def _groups(texts: list[_Text]) -> list[_Group]:
    """Neighbours in order of their tokens, as long as that halves no group's common beginning."""
    groups: list[_Group] = []
    for text in texts:
        if groups:
            same = _common(groups[-1].texts[-1].tokens, text.tokens)
            shared = min(groups[-1].shared, same, text.context)
            if 0 < groups[-1].shared <= 2 * shared:
                groups[-1].texts.append(text)
                groups[-1].shared = shared
                continue
        groups.append(_Group([text], text.context))
    return sorted(groups, key=lambda group: -group.size)


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _read(engine: Engine, batch: list[_Group]) -> Iterator[tuple[_Text, int, Logits]]:
    """The logits behind what a group shares, in pieces: text, position of the first, logits."""
    with ExitStack() as stack:
        begun = [
            (group, stack.enter_context(engine.sequence(group.texts[0].tokens[: group.shared])))
            for group in batch
        ]
        if pending := [sequence for _, sequence in begun if sequence.pending]:
            engine.step(pending)
        texts = [(text, sequence) for group, sequence in begun for text in group.texts]
        for some in _together(texts, lambda one: len(one[0].tokens) - one[1].length, engine.width):
            yield from _read_ends(engine, some)


def _read_ends(
    engine: Engine, texts: list[tuple[_Text, Kept]]
) -> Iterator[tuple[_Text, int, Logits]]:
    with ExitStack() as stack:
        forks = [(text, stack.enter_context(begun.fork())) for text, begun in texts]
        for text, fork in forks:
            fork.extend(text.tokens[fork.length :])
        while waiting := [(text, fork) for text, fork in forks if fork.pending]:
            starts = [fork.length for _, fork in waiting]
            counts = [min(engine.width, len(fork.pending)) for _, fork in waiting]
            parts = engine.every([fork for _, fork in waiting], counts)
            for (text, _), start, (logits, _) in zip(waiting, starts, parts, strict=True):
                yield text, start, logits


def _together(items: Iterable[Item], size: Callable[[Item], int], limit: int) -> list[list[Item]]:
    """Items in order, as many together as the limit on their sizes allows, or one."""
    found: list[list[Item]] = []
    room = 0
    for item in items:
        if not found or size(item) > room:
            found.append([])
            room = limit
        found[-1].append(item)
        room -= size(item)
    return found
