"""Rounding with feedback: its errors cancel in what a matrix gives."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from turbosparse.base.errors import TurboSparseError
from turbosparse.hf.load import load_model, load_tokenizer
from turbosparse.ops.feedback import Feedback
from turbosparse.ops.quant import dequantise, quantise
from turbosparse.pack import pack
from turbosparse.packed.format import Packed
from turbosparse.packed.unpack import state_dict

Make = Callable[..., Path]
INPUTS, OUTPUTS = 96, 64


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(seed: int, rows: int = 500) -> Tensor:
    """Inputs ``[rows, INPUTS]`` that a dozen causes explain for the most part."""
    return normal(rows, 12, seed=seed) @ normal(12, INPUTS, seed=1) + normal(
        rows, INPUTS, seed=seed
    )


def way(name: str, moments: Tensor) -> Callable[[Tensor], Tensor]:
    """Round weights ``[OUTPUTS, INPUTS]``, packed by output or by input."""
    if name == "columns":
        made = Feedback(moments, 32)
        return lambda w: dequantise(made.columns(w), "q4", INPUTS)
    made = Feedback(moments)
    return lambda w: dequantise(made.rows(w.T), "q4", OUTPUTS).T


WAYS = pytest.mark.parametrize("name", ["columns", "rows"])


@WAYS
def test_what_a_matrix_gives_is_nearer_on_other_inputs(name: str) -> None:
    x, other, w = correlated(2), correlated(3), normal(OUTPUTS, INPUTS, seed=4)
    found = way(name, x.T @ x)(w)
    plain = dequantise(quantise(w, "q4"), "q4", INPUTS)
    assert (other @ (found - w).T).norm() < 0.75 * (other @ (plain - w).T).norm()
    assert (found - w).norm() > (plain - w).norm()  # not because the weights are


@WAYS
def test_independent_inputs_have_nothing_to_make_up_for(name: str) -> None:
    w = normal(OUTPUTS, INPUTS, seed=4)
    plain = quantise(w, "q4") if name == "columns" else quantise(w.T.contiguous(), "q4")
    made = Feedback(torch.eye(INPUTS), 32 if name == "columns" else 1)
    assert torch.equal(getattr(made, name)(w if name == "columns" else w.T), plain)


@WAYS
def test_weights_of_this_form_come_through(name: str) -> None:
    x = correlated(2)
    given = dequantise(quantise(normal(OUTPUTS, INPUTS, seed=4), "q4"), "q4", INPUTS)
    given = given if name == "columns" else dequantise(quantise(given.T, "q4"), "q4", OUTPUTS).T
    assert torch.equal(way(name, x.T @ x)(given), given)


@WAYS
@pytest.mark.parametrize("silent", [slice(0, 40), slice(None)])
def test_inputs_that_were_never_seen_are_rounded_too(name: str, silent: slice) -> None:
    x, w = correlated(2), normal(OUTPUTS, INPUTS, seed=4)
    x[:, silent] = 0
    found = way(name, x.T @ x)(w)
    assert (found - w)[:, silent].abs().max() < 0.5


def test_nan_is_refused() -> None:
    with pytest.raises(TurboSparseError, match="a weight of magnitude nan"):
        Feedback(torch.eye(INPUTS)).rows(torch.full((INPUTS, OUTPUTS), torch.nan))


def random_text(seed: int) -> str:
    """Words of letters of which some are rarer."""
    draw = random.Random(seed)
    return " ".join(
        "".join(draw.choices("etaoinshrdlu", range(12, 0, -1), k=4)) for _ in range(900)
    )


@pytest.mark.parametrize("family", ["mistral", "mixtral", "arcee"])
def test_a_model_packed_with_text_is_nearer_to_itself(
    dense: Make, sparse: Make, tmp_path: Path, family: str
) -> None:
    folder = dense(family) if family == "arcee" else sparse(family)
    model, tokenizer = load_model(folder, dtype=torch.float32).eval(), load_tokenizer(folder)
    (tmp_path / "text.txt").write_text(random_text(0))
    ids, off = torch.tensor(tokenizer(random_text(1)).input_ids)[None, :256], {}
    with torch.inference_mode():
        truth = model(ids).logits
        for name in ("plain", "with text", "again"):
            data = None if name == "plain" else [tmp_path / "text.txt"]
            pack(str(folder), tmp_path / name, data=data, tokens=2048)
            model.load_state_dict(state_dict(Packed(tmp_path / name)), strict=False)
            off[name] = float((model(ids).logits - truth).norm())
    assert off["with text"] < 0.9 * off["plain"]
    assert off["again"] == off["with text"]


def test_text_is_for_q4(sparse: Make, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(TurboSparseError, match="--data is for q4 and for a predictor, and neither"):
        pack(str(sparse("mistral")), tmp_path / "packed", quant="q8", data=[corpus])
    with pytest.raises(TurboSparseError, match="--tokens is 0; give at least 1"):
        pack(str(sparse("mistral")), tmp_path / "packed", data=[corpus], tokens=0)
    assert not list(tmp_path.iterdir())
