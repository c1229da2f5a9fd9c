"""Two models on the same items: standard errors, paired tests, and how far their outputs agree."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from turbosparse.base.errors import TurboSparseError
from turbosparse.base.progress import track
from turbosparse.engine.api import Model
from turbosparse.engine.generation import Ends, stream

RESAMPLES = 2000
PROMPT, CONTINUED, PROMPTS = 32, 64, 16  # tokens of a prompt and its continuation; prompts
Array = NDArray[np.float64]
TESTS = (
    "±: standard error over the items, which are questions, or windows of a text. p: of right and "
    "wrong answers the exact McNemar test, of other figures a paired bootstrap over the items "
    f"({RESAMPLES} resamples)"
)


@dataclass(frozen=True)
class Items:
    """A value of each item, in order, and what it counts, such as the tokens of a window."""

    values: Array
    weights: Array | None = None  # None: all count the same
    perplexity: bool = False  # values are nats, and the figure is exp of their mean


@dataclass(frozen=True)
class Figure:
    """One row of the table: a figure of each model, and what the difference is worth."""

    task: str
    metric: str
    items: int
    values: list[float]
    errors: list[float | None]  # None of a single item
    difference: float | None = None  # second − first
    p: float | None = None


def figure(task: str, metric: str, items: Sequence[Items]) -> Figure:
    """Means over the items of one or two models, and a paired test if the items are the same."""
    values, errors = [], []
    for of in items:
        mean, error = float(np.average(of.values, weights=of.weights)), _error(of)
        values.append(math.exp(min(mean, 709)) if of.perplexity else mean)
        errors.append(error if error is None or not of.perplexity else error * values[-1])
    found = Figure(task, metric, len(items[0].values), values, errors)
    one, other = items[0], items[-1]
    if len(items) == 1 or not _same(one, other):
        return found
    binary = all(set(np.unique(of.values)) <= {0.0, 1.0} for of in items)
    change = Items(other.values - one.values, one.weights)
    p = mcnemar(one.values, other.values) if binary else _bootstrap(change)[1]
    return replace(found, difference=values[1] - values[0], p=p)


def _same(one: Items, other: Items) -> bool:
    """Whether two models were asked the same: their windows hold as many tokens."""
    if len(one.values) != len(other.values):
        return False
    return one.weights is None or bool(np.array_equal(one.weights, other.weights))  # type: ignore[arg-type]


def mcnemar(one: Array, other: Array) -> float:
    """Two-sided exact p that two models are right equally often, from where just one is right."""
    only = int((one > other).sum()), int((other > one).sum())
    return float(stats.binomtest(only[0], sum(only)).pvalue) if sum(only) else 1.0


def _error(items: Items) -> float | None:
    """Standard error of a mean; of a weighted one by bootstrap over the items."""
    if len(items.values) < 2:
        return None
    if items.weights is None:
        return float(items.values.std(ddof=1) / len(items.values) ** 0.5)
    return _bootstrap(items)[0]


def _bootstrap(items: Items) -> tuple[float, float | None]:
    """Standard error of a weighted mean, and two-sided p that it is zero."""
    number = len(items.values)
    if number < 2:
        return 0.0, None
    weights = np.ones(number) if items.weights is None else items.weights
    random = np.random.default_rng(0)
    drawn = (random.integers(0, number, number) for _ in range(RESAMPLES))
    means = np.array([np.average(items.values[of], weights=weights[of]) for of in drawn])
    beyond = min((means <= 0).mean(), (means >= 0).mean())
    return float(means.std(ddof=1)), min(1.0, 2 * max(float(beyond), 1 / RESAMPLES))


def agreement(
    corpus: str, one: Model, other: Model, windows: Iterable[Sequence[int]]
) -> list[Figure]:
    """How far the second model's predictions are from the first's, on the same windows.

    KL is Σ p·ln(p/q) with p of the first, per token; top-1 the share of tokens that both find
    likeliest; the greedy prefix how many tokens greedy decoding continues alike, of `CONTINUED`
    behind the first `PROMPT` of some windows.

    Raises:
        TurboSparseError: the vocabularies differ.
    """
    sizes = one.engine.config.vocab_size, other.engine.config.vocab_size
    if sizes[0] != sizes[1]:
        raise TurboSparseError(
            f"two models of {sizes[0]} and {sizes[1]} tokens cannot agree: leave out --data"
        )
    sums: list[Array] = []
    tokens: list[float] = []
    prefixes: list[float] = []
    for ids in track(windows, "agreement"):
        pairs = zip(one.engine.logits(ids[:-1]), other.engine.logits(ids[:-1]), strict=True)
        sums.append(np.sum([_divergence(p, q) for p, q in pairs], axis=0))
        tokens.append(len(ids) - 1.0)
        if len(prefixes) < PROMPTS and len(ids) > PROMPT:
            prefixes.append(_greedy_prefix(one, other, list(ids[:PROMPT])))
    weights = np.array(tokens)
    kl, same = (Items(column / weights, weights) for column in np.array(sums).T)
    found = {"KL, nats/token": kl, "same top-1": same}
    if prefixes:
        found[f"alike of {CONTINUED} greedy tokens"] = Items(np.array(prefixes))
    return [figure(corpus, metric, [items]) for metric, items in found.items()]


def _divergence(p: NDArray[Any], q: NDArray[Any]) -> tuple[float, float]:
    """Sums over tokens of the KL divergence and of equal likeliest tokens."""
    first, second = (of - of.max(1, keepdims=True) for of in (p, q))
    first, second = (of - np.log(np.exp(of).sum(1, keepdims=True)) for of in (first, second))
    divergence = (np.exp(first) * (first - second)).sum()
    return float(divergence), float((p.argmax(1) == q.argmax(1)).sum())


def _greedy_prefix(one: Model, other: Model, prompt: list[int]) -> float:
    """Tokens until greedy decoding of the two parts: the second reads what the first wrote."""
    ends = Ends(min(CONTINUED, one.engine.context - PROMPT))
    written = [token.id for token in stream(one.engine, one.tokenizer, prompt, ends=ends)]
    logits = np.concatenate(list(other.engine.logits([*prompt, *written[:-1]])))
    agreed = logits[len(prompt) - 1 :].argmax(1) == written
    return float(len(written) if agreed.all() else agreed.argmin())
