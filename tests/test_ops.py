"""Every backend against the formula, on awkward shapes and at every sparsity."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import gelu, relu, silu

from turbosparse import ops
from turbosparse.base.errors import TurboSparseError
from turbosparse.hf.activations import WITHOUT_ZEROS
from turbosparse.ops.quant import dequantise, dequantise_ffn, quantise, quantise_ffn
from turbosparse.ops.rows import QUANTS, FFNRows

SAME_SUM = 2e-5  # relative RMS of float32 sums against float64, where terms may cancel

FORMULAS = {
    "drelu": lambda g, u: relu(g) * relu(u),
    "geglu": lambda g, u: gelu(g) * u,
    "reglu": lambda g, u: relu(g) * u,
    "relu": lambda g, u: relu(u),  # noqa: ARG005
    "swiglu": lambda g, u: silu(g) * u,
}


def make_ffn(
    neurons: int, hidden: int, quant: str, lean: float
) -> tuple[FFNRows, tuple[torch.Tensor, ...]]:
    """Rows of random weights and the matrices they stand for; `lean` shifts the gates.

    Gates and ups lean against feature 0, which inputs set to 1: −∞ makes every neuron inactive.
    """
    generator = torch.Generator().manual_seed(neurons * 1000 + hidden)
    parts = list(torch.randn(3, neurons, hidden, generator=generator) / hidden**0.5)
    parts[0][:, 0], parts[1][:, 0] = lean, lean
    rows = quantise_ffn(*parts, (quant,) * 3)
    return rows, dequantise_ffn(rows)


def inputs(tokens: int, hidden: int) -> torch.Tensor:
    """On a grid, which the 15 bits that the core gives the x of q4 hold exactly."""
    x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(tokens))
    x[:, 0] = 1.0
    return (64 * x).round() / 64


def relative_rms(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value - truth).norm() / truth.norm().clamp(min=1e-30))


@pytest.mark.parametrize("backend", ops.BACKENDS)
@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize(
    ("neurons", "hidden", "tokens"), [(1, 32, 1), (7, 96, 3), (63, 544, 2), (1023, 64, 5)]
)
@pytest.mark.parametrize("lean", [3.0, 0.0, -1.0, -50.0])
def test_ffn_is_the_formula(
    backend: str, quant: str, neurons: int, hidden: int, tokens: int, lean: float
) -> None:
    stored, (gate, up, down) = make_ffn(neurons, hidden, quant, lean)
    x = inputs(tokens, hidden)
    for activation, formula in FORMULAS.items():
        g, u = (x.double() @ gate.double().T), (x.double() @ up.double().T)
        combined = formula(g, u)
        truth = (combined @ down.double()).float()
        ffn = ops.backend(backend).Neurons(stored, activation, 2)
        first = combined if activation == "relu" else g
        expected = [torch.full((tokens,), neurons), (first > 0).sum(1), (combined != 0).sum(1)]
        for mode in ("dense",) if activation in WITHOUT_ZEROS else ("dense", "exact"):
            y, counts = ffn.forward(x, x, mode=mode)
            assert relative_rms(y, truth) < SAME_SUM, (activation, mode)
            assert counts.tolist() == torch.stack(expected, 1).tolist()


@pytest.mark.parametrize("backend", ops.BACKENDS)
def test_a_single_active_neuron(backend: str) -> None:
    neurons, hidden = 63, 64
    gate, up, down = (
        -torch.ones(neurons, hidden),
        torch.ones(neurons, hidden),
        torch.rand(neurons, hidden),
    )
    gate[41] = 1.0
    stored = quantise_ffn(gate, up, down, ("f16",) * 3)
    x = torch.rand(1, hidden)
    ffn = ops.backend(backend).Neurons(stored, "drelu", 2)
    y, counts = ffn.forward(x, x, mode="exact")
    assert counts.tolist() == [[neurons, 1, 1]]
    assert relative_rms(y, x.sum() ** 2 * down[41].half().float()[None]) < SAME_SUM


@pytest.mark.parametrize("activation", WITHOUT_ZEROS)
@pytest.mark.parametrize("backend", ops.BACKENDS)
def test_what_has_no_zeros_refuses_exact_mode(backend: str, activation: str) -> None:
    stored, _ = make_ffn(7, 32, "q8", 0.0)
    ffn = ops.backend(backend).Neurons(stored, activation, 1)
    with pytest.raises(ValueError, match="dense mode"):
        ffn.forward(inputs(1, 32), inputs(1, 32), mode="exact")


@pytest.mark.parametrize("backend", ops.BACKENDS)
@pytest.mark.parametrize("quant", QUANTS)
def test_matrix_product_and_rows(backend: str, quant: str) -> None:
    packed = quantise(torch.randn(63, 1056), quant)
    weight = dequantise(packed, quant, 1056)
    matrix = ops.backend(backend).Matrix(packed.numpy(), 1056, quant, 2)
    x = inputs(3, 1056)
    assert relative_rms(matrix.matmul(x), (x.double() @ weight.double().T).float()) < SAME_SUM
    assert torch.equal(matrix.rows([5, 62, 5]), weight[[5, 62, 5]])


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(TurboSparseError, match="backend 'tpu' is unknown; use torch, cpu"):
        ops.backend("tpu")
