"""Which token comes next: repeatable, by probability, and within what the settings allow."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from turbosparse.base.errors import TurboSparseError
from turbosparse.engine.engine import Engine
from turbosparse.engine.generation import Ends, stream
from turbosparse.engine.sampling import Sampler, Sampling
from turbosparse.engine.text import Tokenizer

PROMPT = "The small boats"


def ids(engine: Engine, tokenizer: Tokenizer, **sampling: Any) -> list[int]:
    tokens = stream(
        engine, tokenizer, tokenizer.encode(PROMPT), sampling=Sampling(**sampling), ends=Ends(10)
    )
    return [token.id for token in tokens]


def test_greedy_is_repeatable_whatever_the_seed(engine: Engine, tokenizer: Tokenizer) -> None:
    assert ids(engine, tokenizer, seed=1) == ids(engine, tokenizer, seed=2)


def test_a_seed_makes_sampling_repeatable(engine: Engine, tokenizer: Tokenizer) -> None:
    texts = [ids(engine, tokenizer, temperature=1.5, seed=seed) for seed in (0, 1, 0, 1)]
    assert texts[0] == texts[2]
    assert texts[1] == texts[3]
    assert texts[0] != texts[1]


def test_without_a_seed_texts_differ(engine: Engine, tokenizer: Tokenizer) -> None:
    assert ids(engine, tokenizer, temperature=3.0) != ids(engine, tokenizer, temperature=3.0)


@pytest.mark.parametrize("settings", [{"top_p": 1e-6}, {"temperature": 1e-3}])
def test_a_narrow_nucleus_or_a_low_temperature_is_greedy(
    engine: Engine, tokenizer: Tokenizer, settings: dict[str, float]
) -> None:
    sampled = ids(engine, tokenizer, **{"temperature": 1.0, "seed": 3} | settings)
    assert sampled == ids(engine, tokenizer)


def shares(draws: int = 4000, **sampling: Any) -> list[float]:
    logits = np.log(np.array([0.1, 0.5, 0.15, 0.25], np.float32))
    sampler = Sampler(Sampling(seed=0, **sampling))
    drawn = Counter(sampler.choose(logits) for _ in range(draws))
    return [drawn[token] / draws for token in range(4)]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({"temperature": 0.0}, [0, 1, 0, 0]),
        ({"temperature": 1.0}, [0.1, 0.5, 0.15, 0.25]),
        ({"temperature": 1.0, "top_p": 0.6}, [0, 2 / 3, 0, 1 / 3]),  # the smallest that holds 0.6
        ({"temperature": 1.0, "top_p": 0.4}, [0, 1, 0, 0]),
        ({"temperature": 1.0, "top_k": 3}, [0, 5 / 9, 1.5 / 9, 2.5 / 9]),
        ({"temperature": 1.0, "min_p": 0.29}, [0, 5 / 9, 1.5 / 9, 2.5 / 9]),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.8}, [0, 2 / 3, 0, 1 / 3]),
        ({"temperature": 0.5}, [0.01 / 0.345, 0.25 / 0.345, 0.0225 / 0.345, 0.0625 / 0.345]),
        ({"temperature": 1e9}, [0.25] * 4),
        ({"temperature": 1e-45}, [0, 1, 0, 0]),
    ],
)
def test_tokens_are_drawn_by_their_probability(
    sampling: dict[str, Any], expected: list[float]
) -> None:
    found = shares(**sampling)
    assert found == pytest.approx(expected, abs=0.03)  # four standard deviations
    assert [share == 0 for share in found] == [share == 0 for share in expected]


def test_a_bias_and_a_grammar_decide_what_may_come() -> None:
    assert shares(logit_bias={0: 100.0, 2: -100.0}) == [1, 0, 0, 0]

    class Even:
        came: list[int] = []  # noqa: RUF012

        def mask(self, logits: Any) -> Any:
            return np.where(np.arange(len(logits)) % 2 == 0, logits, -np.inf)

        def accept(self, token: int) -> None:
            self.came.append(token)

    grammar = Even()
    for sampling in (Sampling(), Sampling(temperature=1e9, top_p=0.99, min_p=0.01, seed=1)):
        sampler = Sampler(sampling, grammar=grammar)
        for _ in range(20):
            sampler.choose(np.array([0, 5, 1, 9], np.float32))
    assert grammar.came[:20] == [2] * 20
    assert set(grammar.came[20:]) == {0, 2}


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("width", [0.01, 1.0, 5.0])
def test_a_nucleus_of_a_large_vocabulary_is_that_of_a_sort(width: float, top_p: float) -> None:
    from turbosparse.engine.sampling import _nucleus

    weights = np.exp(np.random.default_rng(1).normal(0, width, 20_000).astype(np.float32))
    order = np.argsort(-weights)
    before = weights[order].cumsum(dtype=np.float64) - weights[order]
    expected = order[before < top_p * weights.sum(dtype=np.float64)]
    assert sorted(_nucleus(weights, top_p)) == sorted(expected)


def test_penalties_push_down_what_came() -> None:
    logits = np.array([1.0, 0.9, 0.5, -0.1], np.float32)
    assert Sampler(Sampling(repetition_penalty=2.0), [0]).choose(logits) == 1
    assert Sampler(Sampling(presence_penalty=1.0), [0]).choose(logits) == 0, "not of the prompt"
    sampler = Sampler(Sampling(presence_penalty=0.3))
    assert [sampler.choose(logits) for _ in range(3)] == [0, 1, 0]
    sampler = Sampler(Sampling(frequency_penalty=0.3))
    assert [sampler.choose(logits) for _ in range(5)] == [0, 1, 0, 1, 2]
    assert logits.tolist() == pytest.approx([1.0, 0.9, 0.5, -0.1]), "the logits stay"


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": "hot"},
        {"top_p": 0.0},
        {"top_p": 1e-300},
        {"top_p": 1.01},
        {"top_k": -1},
        {"top_k": 2.5},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"presence_penalty": float("inf")},
        {"seed": -1},
        {"seed": 2**64},
        {"seed": True},
    ],
)
def test_settings_out_of_range_are_named(sampling: dict[str, Any]) -> None:
    ((name, value),) = sampling.items()
    name = name.replace("_", "-")
    with pytest.raises(TurboSparseError, match=f"{name} is {value!r}; it must be a"):
        Sampling(**sampling)
