"""Which token comes next: greedy, or drawn by probability. In numpy, without a full sort."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from turbosparse.base.errors import TurboSparseError

Logits = NDArray[np.float32]
_FIRST = 256  # candidates of the first try; a peaked distribution needs no more
_BLOCK = 512  # weights that are summed together
_COLDEST = 1e-30  # a temperature that float32 holds; as good as greedy


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the defaults are greedy.

    Penalties and biases come first, then temperature, `top_k`, `top_p` and `min_p`, in this order.

    Raises:
        TurboSparseError: a value out of its range.
    """

    temperature: float = 0.0  # 0 is greedy: always the likeliest token
    top_k: int = 0  # only the k likeliest tokens; 0 is all
    top_p: float = 1.0  # the smallest set of tokens that holds this probability
    min_p: float = 0.0  # tokens at least this share as likely as the likeliest
    repetition_penalty: float = 1.0  # divides the logits of tokens in prompt and text (CTRL §4.1)
    presence_penalty: float = 0.0  # subtracted from the logits of tokens in the text
    frequency_penalty: float = 0.0  # the same, times how often the token came
    seed: int | None = None  # makes drawing repeatable
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to the logits of tokens

    def __post_init__(self) -> None:
        for name, (kind, low, high) in _RANGES.items():
            value = getattr(self, name)
            if name == "seed" and value is None:
                continue
            fits = isinstance(value, (int, kind)) and not isinstance(value, bool)
            if not fits or not low <= value <= high:  # NaN compares false
                what = "a whole number" if kind is int else "a number"
                raise TurboSparseError(
                    f"{name.replace('_', '-')} is {value!r}; it must be {what} from {low} to {high}"
                )


_RANGES: dict[str, tuple[type, float, float]] = {
    "temperature": (float, 0, 1e9),
    "top_k": (int, 0, 2**31 - 1),
    "top_p": (float, 1e-9, 1),
    "min_p": (float, 0, 1),
    "repetition_penalty": (float, 0.01, 100),
    "presence_penalty": (float, -100, 100),
    "frequency_penalty": (float, -100, 100),
    "seed": (int, 0, 2**63 - 1),
}


class Grammar(Protocol):
    """Says which tokens may come next, as a grammar does."""

    def mask(self, logits: Logits) -> Logits:
        """The logits, with minus infinity for tokens that may not come; one at least may."""

    def accept(self, token: int) -> None:
        """This token came."""


class Sampler:
    """Chooses the tokens of one text: the settings, the random state, and what it has seen."""

    def __init__(
        self,
        settings: Sampling | None = None,
        prompt: Iterable[int] = (),
        grammar: Grammar | None = None,
    ):
        self.settings = settings or Sampling()
        self._grammar = grammar
        self._random = np.random.Generator(np.random.PCG64(self.settings.seed))
        self._prompt = frozenset(prompt)
        self._text: Counter[int] = Counter()

    def copy(self) -> Sampler:
        """One that draws the same from here on."""
        return copy.deepcopy(self)

    def choose(self, logits: Logits) -> int:
        """The next token of finite ``[vocabulary]`` logits."""
        settings = self.settings
        logits = self._biased(self._penalised(logits))
        if self._grammar:
            logits = self._grammar.mask(logits)
        if settings.temperature == 0:
            token = int(logits.argmax())
        else:
            # from the largest down: a low temperature makes weights of 0, never inf or NaN
            with np.errstate(over="ignore"):
                scaled = (logits - logits.max()) / np.float32(max(settings.temperature, _COLDEST))
            ids, weights = _likeliest(scaled, settings)
            drawn = _draw(weights, self._random.random())
            token = int(drawn if ids is None else ids[drawn])
        self._text[token] += 1
        if self._grammar:
            self._grammar.accept(token)
        return token

    def _biased(self, logits: Logits) -> Logits:
        if bias := self.settings.logit_bias:
            logits = logits.copy()
            logits[list(bias)] += np.fromiter(bias.values(), np.float32, len(bias))
        return logits

    def _penalised(self, logits: Logits) -> Logits:
        s = self.settings
        if s.repetition_penalty == 1 and s.presence_penalty == 0 and s.frequency_penalty == 0:
            return logits
        logits = logits.copy()
        seen = np.array(sorted(self._prompt | self._text.keys()), np.intp)
        of_seen = logits[seen]
        logits[seen] = np.where(
            of_seen > 0, of_seen / s.repetition_penalty, of_seen * s.repetition_penalty
        )
        ids = np.fromiter(self._text.keys(), np.intp, len(self._text))
        times = np.fromiter(self._text.values(), np.float32, len(self._text))
        logits[ids] -= s.presence_penalty + s.frequency_penalty * times
        return logits


def _likeliest(scaled: Logits, settings: Sampling) -> tuple[NDArray[np.intp] | None, Logits]:
    """Ids and weights of the tokens to draw from; ids None if it is all of them.

    `scaled` are log-probabilities but for a constant, 0 for the likeliest.
    """
    ids = None
    if 0 < settings.top_k < len(scaled):
        ids = np.argpartition(scaled, -settings.top_k)[-settings.top_k :]
        scaled = scaled[ids]
    weights = np.exp(scaled)
    if settings.top_p < 1:
        kept = _nucleus(weights, settings.top_p)
        ids, weights = kept if ids is None else ids[kept], weights[kept]
    if settings.min_p:
        kept = np.flatnonzero(weights >= settings.min_p)
        ids, weights = kept if ids is None else ids[kept], weights[kept]
    return ids, weights


def _nucleus(weights: Logits, share: float) -> NDArray[np.intp]:
    """The fewest indices that hold this share of the mass; the likeliest is always one."""
    target, count = share * float(weights.sum(dtype=np.float64)), _FIRST
    while True:
        count = min(count, len(weights))
        ids = np.argpartition(weights, -count)[-count:]
        if count == len(weights) or weights[ids].sum(dtype=np.float64) >= target:
            break
        count *= 16
    ids = ids[np.argsort(-weights[ids])]
    before = np.cumsum(weights[ids], dtype=np.float64) - weights[ids]
    return ids[: max(1, int(np.count_nonzero(before < target)))]


def _draw(weights: Logits, uniform: float) -> int:
    """An index, by weight: first its block, then within it, for running sums of all are slow."""
    sums = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK), dtype=np.float64).cumsum()
    block, rest = _find(sums, uniform * sums[-1])
    inner = weights[block * _BLOCK : (block + 1) * _BLOCK].cumsum(dtype=np.float64)
    return block * _BLOCK + _find(inner, rest)[0]


def _find(sums: NDArray[np.float64], target: float) -> tuple[int, float]:
    """Where running sums first exceed the target, and what of it is left there."""
    # where rounding puts the target past the end it is the last entry that adds anything
    index = min(int(np.searchsorted(sums, target, side="right")), int(sums.argmax()))
    return index, target - (sums[index - 1] if index else 0.0)
