"""Calibrated surgery: of one FFN, by `convert`, and at the start of training."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import FAMILIES, drelu_recipe
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import relu, silu

from turbosparse.base.errors import TurboSparseError
from turbosparse.convert import convert
from turbosparse.hf.load import load_model, load_tokenizer
from turbosparse.hf.surgery import calibrate, fit
from turbosparse.pack import pack
from turbosparse.train import train
from turbosparse.training.mixture import Mixture, training_stream

Make = Callable[..., Path]
HIDDEN, NEURONS, ROWS = 12, 20, 9000  # of rows more than are taken at a time


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense_ffn() -> tuple[Tensor, Tensor, Tensor]:
    return random(NEURONS, HIDDEN, seed=2), random(NEURONS, HIDDEN, seed=3), random(HIDDEN, NEURONS)


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (silu(x @ gate.T) * (x @ up.T)) @ down.T


def drelu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (relu(x @ gate.T) * relu(x @ up.T)) @ down.T


# --- one FFN --------------------------------------------------------------------------------------


def explained_by(y: Tensor, truth: Tensor) -> float:
    return float(1 - (y - truth).square().sum() / (truth - truth.mean(0)).square().sum())


def test_both_halves_of_each_neuron_are_the_whole_of_it() -> None:
    """A large gate makes silu a relu, so that two dReLU neurons are one SwiGLU neuron."""
    gate, up, down = dense_ffn()
    gate *= 100
    x = random(ROWS, HIDDEN, seed=1)
    truth = swiglu(x, gate, up, down)
    *new, explained = fit(gate, up, down, x, 2 * NEURONS)
    assert explained == pytest.approx(1, abs=1e-4)
    assert (drelu(x, *new) - truth).norm() < 0.01 * truth.norm()
    assert (drelu(x, gate, up, down) - truth).norm() > 0.5 * truth.norm()


def test_the_half_that_adds_most_is_kept() -> None:
    """Of neurons whose up is below zero dReLU would leave nothing."""
    gate, up, down = dense_ffn()
    x, up = random(ROWS, HIDDEN, seed=1).abs(), up.abs()
    up[::2] *= -1
    new_gate, new_up, _, explained = fit(gate, up, down, x, NEURONS)
    assert torch.equal(new_up.sort(0).values, up.abs().sort(0).values)
    assert torch.equal(new_gate.sort(0).values, gate.sort(0).values)
    assert explained > 0.95


def test_the_share_that_is_explained_is_that_of_the_new_output() -> None:
    weights = dense_ffn()
    x = random(ROWS, HIDDEN, seed=1)
    truth = swiglu(x, *weights)
    plain = explained_by(drelu(x, *weights), truth)
    found = []
    for neurons in (NEURONS, NEURONS * 3 // 2, NEURONS * 2):
        *new, explained = fit(*weights, x, neurons)
        assert [tuple(weight.shape) for weight in new] == [
            (neurons, HIDDEN),
            (neurons, HIDDEN),
            (HIDDEN, neurons),
        ]
        assert explained == pytest.approx(explained_by(drelu(x, *new), truth), abs=1e-4)
        found.append(explained)
    assert plain < found[0] < found[1] < found[2]


def test_little_text_leaves_the_rest_as_it_was() -> None:
    """One token says something of the neurons that it makes fire; the others keep their columns."""
    gate, up, down = dense_ffn()
    x = random(1, HIDDEN, seed=1)
    new_gate, new_up, new_down, _ = fit(gate, up, down, x, NEURONS)
    silent = (relu(x @ new_gate.T) * relu(x @ new_up.T))[0] == 0
    before = {tuple(column) for column in torch.cat([down, -down], 1).T.tolist()}
    assert 0 < silent.sum() < NEURONS
    for column in new_down.T[silent].tolist():
        assert min(math.dist(column, other) for other in before) < 1e-5


@pytest.mark.parametrize("x", [torch.zeros(0, HIDDEN), torch.zeros(3, HIDDEN)])
def test_no_text_leaves_everything_as_it_was(x: Tensor) -> None:
    weights = dense_ffn()
    *new, explained = fit(*weights, x, NEURONS)
    assert explained is None
    for weight, old in zip(new, weights, strict=True):
        torch.testing.assert_close(weight, old)


# --- convert --------------------------------------------------------------------------------------


def outputs_of(folder: Path, corpus: Path) -> Tensor:
    """The last hidden states on the corpus."""
    model = load_model(folder, dtype=torch.float32)
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    ids = torch.tensor([load_tokenizer(folder)(" ".join(texts))["input_ids"][:150]])
    with torch.inference_mode():
        hidden: Tensor = model.model(ids).last_hidden_state
    return hidden


@pytest.mark.parametrize("family", FAMILIES)
def test_a_calibrated_model_is_nearer_to_the_dense_one(
    dense: Make, sparse: Make, corpus: Path, tmp_path: Path, family: str
) -> None:
    truth = outputs_of(dense(family), corpus)
    distance = {"plain": float((outputs_of(sparse(family), corpus) - truth).norm())}
    for widen in (1, 2):
        out = tmp_path / f"wide{widen}"
        made = convert(str(dense(family)), out, data=[corpus], widen=widen)
        distance[out.name] = float((outputs_of(out, corpus) - truth).norm())
        config = json.loads((out / "config.json").read_text())
        assert config["intermediate_size"] == 96 * widen
        assert config["ffn_activation"] == "drelu"
        assert made.explained is not None
        assert len(made.explained) == config["num_hidden_layers"]
        assert made.parameters == sum(
            p.numel() for p in load_file(out / "model.safetensors").values()
        )
    assert distance["wide2"] < 0.75 * distance["wide1"]
    assert distance["wide1"] < 0.5 * distance["plain"]
    packed = pack(str(tmp_path / "wide2"), tmp_path / "packed", quant="f16")
    assert packed is not None


@pytest.mark.parametrize(
    ("options", "message"),
    {
        "too wide": ({"widen": 2.5, "data": True}, "--widen 2.5: a neuron has two halves; give a"),
        "wide without text": ({"widen": 1.5}, "--widen needs --data: text says which halves to"),
        "not drelu": ({"activation": "reglu", "data": True}, "leave it out with reglu"),
        "linked": ({"link": True, "data": True}, "--data changes them: leave one out"),
        "no tokens": ({"tokens": 0, "data": True}, "--tokens is 0; give at least 1"),
        "short text": ({"tokens": 150, "data": "short"}, "has less than 150 tokens; give more"),
    }.values(),
)
def test_what_cannot_be_calibrated(
    dense: Make, corpus: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("The small boats.")
    data = {True: [corpus], "short": [short]}.get(options.get("data", ""))
    with pytest.raises(TurboSparseError) as error:
        convert(str(dense("mistral")), tmp_path / "out", **options | {"data": data})
    assert message in str(error.value)
    assert list(tmp_path.iterdir()) == [short]


# --- train ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_thread")
def test_training_calibrates_a_dense_model_first(
    dense: Make, sparse: Make, corpus: Path, tmp_path: Path, capsys: Any
) -> None:
    """On the first sequences of the run; a model that is sparse already is left alone."""
    fields = {"tokens": 4096, "batch_size": 8, "checkpoint_every": 100}
    recipe = drelu_recipe(dense("mistral"), corpus, 64, **fields)
    mixture = Mixture.model_validate(recipe["data"])
    tokenizer = load_tokenizer(dense("mistral"))
    stream = training_stream(mixture, tokenizer, root=tmp_path, seed=0)
    rows = [row["input_ids"] for row in islice(stream, 64)]
    batch = torch.tensor(rows[:8])
    expected = {}
    for name in ("calibrated", "plain"):
        model = load_model(dense("mistral"), activation="drelu", dtype=torch.float32)
        if name == "calibrated":
            calibrate(model, rows)
        with torch.no_grad():
            expected[name] = float(model(batch, labels=batch).loss)
    expected["sparse"] = expected["plain"]
    assert abs(expected["calibrated"] - expected["plain"]) > 1e-3
    for name, changes in {
        "calibrated": {},
        "plain": {"calibration_tokens": 0},
        "sparse": {"model": str(sparse("mistral"))},
    }.items():
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | changes))
        train(tmp_path / "recipe.yaml", out=tmp_path / name)
        said = "calibrating on 4096 tokens" in capsys.readouterr().err
        assert said == (name == "calibrated")
        log = (tmp_path / name / "training_log.jsonl").read_text().splitlines()
        assert json.loads(log[0])["loss"] == pytest.approx(expected[name], rel=1e-5)


def test_a_sharded_run_does_not_calibrate(dense: Make, corpus: Path, tmp_path: Path) -> None:
    recipe = drelu_recipe(dense("mistral"), corpus, 64, tokens=512, batch_size=8, shard="full")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(TurboSparseError, match="needs all of it in one process: make the dReLU"):
        train(tmp_path / "recipe.yaml", out=tmp_path / "out")
