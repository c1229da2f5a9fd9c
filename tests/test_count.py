"""Counting: the published models' figures, and what the engine's own counters say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CONTEXT

from turbosparse.analyse import analyse
from turbosparse.base.errors import TurboSparseError
from turbosparse.count import Count, count
from turbosparse.engine.engine import Engine
from turbosparse.engine.text import Tokenizer
from turbosparse.pack import pack

Make = Callable[..., Path]


def billions(number: float) -> float:
    return round(number / 1e9, 3)


def part(counted: Count, mode: str, *names: str) -> float:
    return billions(sum(counted.parameters[mode][name] for name in names))


@pytest.mark.parametrize(
    ("shape", "sparsity", "rank", "active", "predictors", "dense", "both", "without", "ratio"),
    [
        ("mistral-7b", 0.90, 1269, 0.564, 0.748, 7.242, 2.92, (2.79, 2.17), 2.48),
        # ranks 896 to 1344, 1036 on average, in the two experts of a token
        ("mixtral-8x7b", 0.85, 1036, 1.691, 1.222, 12.88, 4.52, (4.39, 3.30), 2.85),
    ],
)
def test_published_models(
    shape: str,
    sparsity: float,
    rank: int,
    active: float,
    predictors: float,
    dense: float,
    both: float,
    without: tuple[float, float],
    ratio: float,
) -> None:
    """The Turbo Sparse models: 3B and 4.5B count the predictors and the whole input embedding."""
    found = count(shape, sparsity=sparsity, rank=rank, bandwidth=50)
    assert part(found, "oracle", "gates", "ups", "downs") == active
    assert part(found, "predicted", "predictors") == pytest.approx(predictors, abs=1.1e-3)
    embedding = 32000 * 4096
    all_dense = sum(found.parameters["dense"].values()) - 4096 + embedding
    assert billions(all_dense) == pytest.approx(dense, abs=0.005)
    counts = {name: number / 1e9 for name, number in found.activated.items()}
    whole = counts["with the whole input embedding and predictors"]
    assert round(whole, 2) == both
    assert round(counts["with predictors"], 2) == without[0]
    assert round(counts["with the whole input embedding"], 2) == without[1]
    assert round(all_dense / 1e9 / whole, 2) == ratio
    assert found.total == {"mistral-7b": 7_241_732_096, "mixtral-8x7b": 46_702_792_704}[shape]


def test_the_speed_is_the_bandwidth_over_the_bytes() -> None:
    found = count("llama-1b", sparsity=0.9, quant="q8", bandwidth=10, positions=100)
    assert set(found.bytes) == {"dense", "exact", "oracle"}  # no predictor is known
    for mode, parts in found.bytes.items():
        assert found.tokens_per_second[mode] == pytest.approx(1e10 / sum(parts.values()))
        assert parts["keys and values"] == 100 * 2 * 2 * 4 * 64 * 22
    assert found.gate_positive == pytest.approx(0.1**0.5)
    row = 2048 + 2 * 64  # int8 weights and their scales
    assert found.bytes["dense"]["gates"] == found.bytes["exact"]["gates"] == 22 * 5632 * row
    assert found.bytes["exact"]["downs"] == pytest.approx(0.1 * 22 * 5632 * row)


@pytest.mark.parametrize("family", ["mistral", "nemotron"])
def test_flops_are_those_that_torch_counts(dense: Make, family: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(dense(family), attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.tensor([[5]]))
    sparsity = 0.5 if family == "nemotron" else None
    found = count(str(dense(family)), sparsity=sparsity, positions=1, bandwidth=1)
    assert sum(found.flops["dense"].values()) == counter.get_total_flops()


@pytest.mark.parametrize("family", ["mistral", "mixtral", "arcee"])
def test_a_measured_count_is_what_the_engine_touches(
    sparse: Make, corpus: Path, tmp_path: Path, family: str
) -> None:
    """Bytes by the statistics of `analyse` against the counters of the core, on the same text."""
    analyse(str(sparse(family)), out=tmp_path, data=[corpus], last=8, truncate=True)
    pack(
        str(sparse(family)),
        tmp_path / "packed",
        quant="f16",
        stats=tmp_path / "stats.turbosparse",
    )
    found = count(str(tmp_path / "packed"), bandwidth=1)
    assert found.source.startswith("measured on ")
    engine, tokenizer = Engine(tmp_path / "packed", mode="exact"), Tokenizer(tmp_path / "packed")
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()[-8:]]
    used = np.concatenate(
        [u for text in texts for _, u in engine.read(tokenizer.encode(text)[:-1][:CONTEXT])], axis=1
    )
    assert found.source == f"measured on {used.shape[1]} tokens"
    row, (_, gate, active) = 128, used.mean(1).sum(0)
    neurons = 2 * 96 * (2 if family == "mixtral" else 1)
    exact, gated = found.bytes["exact"], family != "arcee"
    assert exact["gates"] == row * neurons
    assert exact["ups"] == pytest.approx(row * gate if gated else 0, rel=0.01)
    assert exact["downs"] == pytest.approx(row * active, rel=0.01)
    oracle = found.bytes["oracle"]
    assert sum(oracle[p] for p in ("gates", "ups", "downs")) == pytest.approx(
        row * (3 if gated else 2) * active, rel=0.01
    )


def test_a_predicted_count_is_what_the_engine_touches(merged: Path, tmp_path: Path) -> None:
    pack(str(merged), tmp_path / "packed", quant="f16", predictor_quant="f16")
    engine = Engine(tmp_path / "packed", mode="predicted")
    ((_, used),) = engine.read(range(2, 60))
    shares = used.mean((0, 1)) / 96
    found = count(
        str(tmp_path / "packed"),
        sparsity=1 - float(shares[2]) / 0.5,  # the recall that the folder records
        candidates=float(shares[0]),
        bandwidth=1,
    )
    row, (candidates, _, active) = 128, used.mean(1).sum(0)
    assert found.bytes["predicted"]["gates"] == pytest.approx(row * candidates)
    assert found.bytes["predicted"]["downs"] == pytest.approx(row * active)
    matrices = [spec for spec in engine.packed.plan.values() if spec.role == "predictor"]
    assert found.bytes["predicted"]["predictors"] == sum(spec.nbytes for spec in matrices)
    assert found.parameters["predicted"]["predictors"] == (32 + 64) * (64 + 96)
    unpacked = count(str(merged), sparsity=0.5, bandwidth=1)
    assert unpacked.parameters["predicted"]["predictors"] == (32 + 64) * (64 + 96)


def test_a_config_is_enough(dense: Make, tmp_path: Path) -> None:
    shutil.copy(dense("mistral") / "config.json", tmp_path)
    found = count(str(tmp_path), bandwidth=1)
    assert (found.activation, set(found.bytes)) == ("swiglu", {"dense"})
    assert found.activated["by the rule"] == round(sum(found.parameters["dense"].values()))
    assert count(str(tmp_path), sparsity=0.5, bandwidth=1).activation == "drelu"
    assert count(str(tmp_path), sparsity=0.5, activation="reglu", bandwidth=1).gate_positive == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.5}, "--sparsity 1.5 is a share: give 0 to 1"),
        ({"candidates": -1.0}, "--candidates -1 is a share"),
        ({"rank": 0}, "--rank 0, at least 1"),
        ({"positions": -1}, "--positions is -1, at least 0"),
        ({"bandwidth": 0.0}, "--bandwidth 0 must be more than 0"),
        ({"activation": "drelu"}, "the sparsity of llama-1b is not known: give --sparsity"),
        ({"stats": "no/such"}, "no such statistics file"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(TurboSparseError, match=message):
        count("llama-1b", **({"bandwidth": 1.0} | arguments))  # type: ignore[arg-type]
