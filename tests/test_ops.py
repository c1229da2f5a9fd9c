"""The reference, which all kernels are held to, by hand; and all backends behind its interface."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch.nn.functional import gelu, relu, silu

from turbosparse import ops
from turbosparse.base.errors import TurboSparseError
from turbosparse.hf.activations import ACTIVATIONS, WITHOUT_ZEROS
from turbosparse.ops.predictor import PackedPredictor, Predictor
from turbosparse.ops.quant import dequantise, quantise, quantise_ffn, signs
from turbosparse.ops.reference import low_rank_candidates, sign_candidates, sparse_ffn
from turbosparse.ops.rows import QUANTS, FFNRows

BACKENDS = ["torch", "cpu"]
if find_spec("triton") and not torch.cuda.is_available():  # on a card: test_gpu.py
    import interpreter

    interpreter.make_fast()
    BACKENDS.append("gpu")
SAME_SUM = 2e-5  # relative RMS of float32 sums against float64, where terms may cancel
NEURONS, HIDDEN = 203, 96

FORMULAS = {
    "drelu": lambda g, u: relu(g) * relu(u),
    "geglu": lambda g, u: gelu(g) * u,
    "reglu": lambda g, u: relu(g) * u,
    "relu": lambda g, u: relu(u),  # noqa: ARG005
    "relu2": lambda g, u: relu(u) ** 2,  # noqa: ARG005
    "swiglu": lambda g, u: silu(g) * u,
}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_rms(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value - truth).norm() / truth.norm().clamp(min=1e-30))


# -- by hand -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["dense", "exact", "predicted"])
@pytest.mark.parametrize("activation", FORMULAS)
def test_sparse_ffn_is_the_formula(activation: str, mode: ops.Mode) -> None:
    x, (gate, up, down) = random(5, HIDDEN), random(3, NEURONS, HIDDEN, seed=1)
    candidates = random(5, NEURONS, seed=2) > 0.5 if mode == "predicted" else None
    rest = {"mode": mode, "candidates": candidates}
    if mode != "dense" and activation in WITHOUT_ZEROS:
        with pytest.raises(ValueError, match=f"{activation} has no exact zeros .* use dense mode"):
            sparse_ffn(x, gate, up, down, activation, **rest)
        return
    offered = torch.ones(5, NEURONS, dtype=torch.bool) if candidates is None else candidates
    g, u = (x.double() @ w.double().T for w in (gate, up))
    combined = FORMULAS[activation](g, u) * offered
    y, counts = sparse_ffn(x, gate, up, down, activation, **rest)
    assert relative_rms(y, (combined @ down.double()).float()) < SAME_SUM
    first = g if ACTIVATIONS[activation].gated else u
    expected = [offered.sum(1), ((first > 0) & offered).sum(1), combined.ne(0).sum(1)]
    known = 2 if activation in WITHOUT_ZEROS else 3  # what is tiny may be zero or not
    assert counts[:, :known].tolist() == torch.stack(expected[:known], 1).tolist()


def test_candidates_belong_to_predicted_mode() -> None:
    x, weights = random(1, HIDDEN), random(3, NEURONS, HIDDEN)
    some = torch.ones(1, NEURONS, dtype=torch.bool)
    with pytest.raises(ValueError, match="needs candidates"):
        sparse_ffn(x, *weights, "drelu", mode="predicted")
    with pytest.raises(ValueError, match="the other modes take none"):
        sparse_ffn(x, *weights, "drelu", mode="exact", candidates=some)


def test_low_rank_candidates() -> None:
    fc1 = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    fc2 = torch.tensor([[2.0, 0.0], [0.0, 2.0], [1.0, -1.0]])
    h = torch.tensor([[3.0, -5.0], [1.0, 1.0], [float("nan"), 0.0]])
    found = low_rank_candidates(h, fc1, fc2, 2.0)  # logits [6, 0, 3], [2, 2, 0], NaN
    assert found.tolist() == [[True, False, True], [True, True, False], [True, True, True]]


def test_sign_candidates() -> None:
    x = torch.tensor([[1.0, -2.0, 3.0, 0.0]])  # zero is not negative
    agrees, differs = [False, True, False, False], [True, True, True, False]  # scores 1 and 0
    gate = torch.tensor([agrees, agrees, differs])
    up = torch.tensor([agrees, differs, agrees])
    assert sign_candidates(x, [gate], 0.5)[0].tolist() == [True, True, False]
    assert sign_candidates(x, [gate, up], 0.5)[0].tolist() == [True, False, False]
    assert sign_candidates(x, [gate, up], 0.0).all(), "as much as the threshold is enough"


# -- all backends --------------------------------------------------------------------------------


def stored() -> FFNRows:
    return quantise_ffn(random(3, NEURONS, HIDDEN) / HIDDEN**0.5, ("q8",) * 3)


def predictor(kind: str, reads: str = "post_norm") -> PackedPredictor:
    if kind == "sign":
        about = Predictor(kind="sign", input="post_norm", threshold=0.05)
        return PackedPredictor(about, {"signs": signs(stored(), 2)})
    fc1, fc2 = (quantise(random(*shape), "q8").numpy() for shape in ((32, HIDDEN), (NEURONS, 32)))
    about = Predictor(kind="low_rank", input=reads, threshold=0.3, quant="q8", ranks=[[32]])
    return PackedPredictor(about, {"fc1": fc1, "fc2": fc2})


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matrix(backend: str, quant: str) -> None:
    packed = quantise(random(63, 1056), quant)
    weight = dequantise(packed, quant, 1056)
    matrix = ops.backend(backend).Matrix(packed.numpy(), 1056, quant, 2)
    x = (64 * random(1056, 3)).round().T / 64  # a grid, which 15 bits hold; not contiguous
    assert relative_rms(matrix.matmul(x), (x.double() @ weight.double().T).float()) < SAME_SUM
    assert torch.equal(matrix.rows([5, 62, 5]), weight[[5, 62, 5]])


@pytest.mark.parametrize("kind", [None, "sign", "low_rank"])
def test_backends_are_one_feed_forward(kind: str | None) -> None:
    x, residual = (random(HIDDEN, 3, seed=seed).T for seed in (3, 4))
    for mode in ("predicted",) if kind else ("dense", "exact"):
        (truth, expected), *others = (
            ops.backend(backend)
            .Neurons(stored(), "drelu", 2, kind and predictor(kind))
            .forward(x, residual, mode=mode)
            for backend in BACKENDS
        )
        for y, counts in others:
            assert relative_rms(y, truth) < SAME_SUM
            assert torch.equal(counts, expected)


@pytest.mark.parametrize("reads", ["pre_norm", "post_norm"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_predictor_reads_the_input_that_it_names(backend: str, reads: str) -> None:
    """A NaN makes every neuron a candidate, and a NaN in x shows in the output."""
    ffn = ops.backend(backend).Neurons(stored(), "drelu", 1, predictor("low_rank", reads))
    x, broken = random(1, HIDDEN, seed=3), torch.full((1, HIDDEN), torch.nan)
    _, counts = ffn.forward(x, broken, mode="predicted")
    assert (counts[0, 0] == NEURONS) == (reads == "pre_norm")
    y, counts = ffn.forward(broken, x, mode="predicted")
    assert (counts[0, 0] == NEURONS) == (reads == "post_norm")
    assert y.isnan().all()


@pytest.mark.parametrize("mode", ["dense", "exact", "predicted"])
@pytest.mark.parametrize("activation", [name for name, a in ACTIVATIONS.items() if a.cuts])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gate_up_to_the_threshold_is_inactive(
    backend: str, activation: str, mode: ops.Mode
) -> None:
    """FATReLU by hand: gates below, at and above the threshold; a NaN shows."""
    gate, up, down = torch.zeros(3, 5, HIDDEN)
    gate[:, 0] = torch.tensor([-1.0, 0.125, 0.25, 0.375, 2.0])
    up[:, 1], down[:, 0] = torch.tensor([1.0, 1, 1, -2, 4]), 1.0
    x = torch.zeros(2, HIDDEN)
    x[:, :2] = 1
    x[1, 0] = torch.nan
    rows = quantise_ffn((gate, up, down), ("f16",) * 3)
    let_through = PackedPredictor(
        Predictor(kind="sign", input="post_norm", threshold=-1.0), {"signs": signs(rows, 1)}
    )
    ffn = ops.backend(backend).Neurons(rows, activation, 2, let_through, threshold=0.25)
    y, counts = ffn.forward(x, x, mode=mode)
    combined = FORMULAS[activation](torch.tensor([0.375, 2.0]), torch.tensor([-2.0, 4.0]))
    assert float(y[0, 0]) == float(combined.sum())
    assert counts[0].tolist() == [5, 2, int(combined.ne(0).sum())]
    assert y[1].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mode_that_a_feed_forward_does_not_have_is_refused(backend: str) -> None:
    x = random(1, HIDDEN)
    neurons = ops.backend(backend).Neurons
    with pytest.raises(ValueError, match="predicted mode needs a predictor"):
        neurons(stored(), "drelu", 1).forward(x, x, mode="predicted")
    for activation in WITHOUT_ZEROS:
        with pytest.raises(ValueError, match="dense mode"):
            neurons(stored(), activation, 1).forward(x, x, mode="exact")


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(TurboSparseError, match="backend 'tpu' is unknown; use torch, cpu, gpu"):
        ops.backend("tpu")
