"""Log-likelihoods of many continuations: as if each were read alone, at less cost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import turbosparse
from turbosparse.base.errors import TurboSparseError
from turbosparse.engine.api import Model
from turbosparse.engine.engine import Engine
from turbosparse.engine.scoring import Request, score


@pytest.fixture(scope="module")
def model(packed_mistral: Path) -> Model:
    return turbosparse.load(packed_mistral, threads=1)


def questions() -> list[Request]:
    """Choices of all lengths behind contexts that have beginnings in common."""
    random = np.random.default_rng(1)
    begin = random.integers(2, 320, 30).tolist()
    found: list[Request] = []
    for size in (1, 7, 20):
        context = begin + random.integers(2, 320, size).tolist()
        found += [(context, random.integers(2, 320, n).tolist()) for n in (1, 1, 4, 9)]
    found.append(([5], [7, 9]))  # nothing to share
    found.append((begin, [3]))  # the beginning itself
    found.append((random.integers(2, 320, 300).tolist(), [4, 8]))  # longer than the context
    return [found[number] for number in random.permutation(len(found))]


def test_scores_are_those_of_each_text_alone(model: Model) -> None:
    requests = questions()
    context = model.engine.context
    for (before, after), (log_probability, greedy) in zip(
        requests, score(model.engine, requests), strict=True
    ):
        ids = [*before, *after][-context - 1 :]
        logits = np.concatenate(list(model.engine.logits(ids[:-1])))[-len(after) :]
        assert greedy == bool((logits.argmax(1) == after).all())
        if len(ids) <= context:
            alone = model.score(ids)[-len(after) :].sum()
            assert log_probability == pytest.approx(float(alone), abs=1e-4)


def test_what_is_greedy_is_found(model: Model) -> None:
    context = [0, 9, 30, 12]
    logits = np.concatenate(list(model.engine.logits(context)))
    best = int(logits[-1].argmax())
    scores = score(model.engine, [(context, [best]), (context, [best + 1])])
    assert [one.greedy for one in scores] == [True, False]
    assert scores[0].log_probability > scores[1].log_probability


def test_what_texts_share_is_read_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    step = Engine._pass

    def counted(self: Engine, sequences: list[object], counts: list[int], **rest: object) -> object:
        read.extend(counts)
        return step(self, sequences, counts, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Engine, "_pass", counted)
    context = list(range(2, 102))
    score(model.engine, [(context, [n, n + 1, n + 2]) for n in range(10)])
    assert sum(read) == 99 + 10 * 3  # the context but its last token; that and two of each
    read.clear()
    score(model.engine, [(context, [n]) for n in range(10)])
    assert sum(read) == 100  # one text answers all
    assert not model.engine.budget.used


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (([], [1]), "request 0 has a context of 0 and a continuation of 1 tokens"),
        (([1], []), "a continuation of 0 tokens"),
        (([1], [1] * 161), "fit the model's context of 160"),
        (([1], [320]), "token 320 is outside the model's vocabulary of 320"),
    ],
)
def test_bad_requests(model: Model, request_: Request, message: str) -> None:
    with pytest.raises(TurboSparseError, match=message):
        score(model.engine, [request_])
