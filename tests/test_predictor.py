"""Predicted mode: what the two kinds of predictor pick, on every backend and instruction set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from turbosparse import _core, ops
from turbosparse.ops.predictor import PackedPredictor, Predictor
from turbosparse.ops.quant import (
    dequantise,
    dequantise_ffn,
    negative,
    quantise,
    quantise_ffn,
    sign_bits,
    signs,
)
from turbosparse.ops.reference import low_rank_candidates, sign_candidates, sparse_ffn
from turbosparse.ops.rows import QUANTS, FFNRows

SAME_SUM = 5e-5  # relative RMS; the core rounds the features of a q4 predictor to 15 bits
ACTIVATIONS = ("drelu", "reglu", "relu")
NEURONS, HIDDEN = 203, 96


@pytest.fixture(params=_core.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _core.isa()
    _core.set_isa(request.param)
    yield request.param
    _core.set_isa(before)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(quant: str, neurons: int = NEURONS, hidden: int = HIDDEN) -> FFNRows:
    parts = random(3, neurons, hidden) / hidden**0.5
    return quantise_ffn(*parts, (quant,) * 3)


def core_neurons(
    rows: FFNRows, activation: str, predictor: _core.Predictor | None = None
) -> _core.Neurons:
    return _core.Neurons(rows.gates, rows.pairs, rows.hidden, rows.quants, activation, predictor)


def low_rank(
    quant: str,
    rank: int,
    threshold: float,
    *,
    neurons: int = NEURONS,
    hidden: int = HIDDEN,
    **settings: Any,
) -> PackedPredictor:
    """A random one; its logits have deviations around 1."""
    fc1, fc2 = random(rank, hidden, seed=1) / hidden**0.5, random(neurons, rank, seed=2) / rank**0.5
    about = Predictor(
        kind="low_rank",
        quant=quant,
        ranks=[[rank]],
        threshold=threshold,
        **({"input": "post_norm"} | settings),
    )
    tensors = {"fc1": quantise(fc1, quant).numpy(), "fc2": quantise(fc2, quant).numpy()}
    return PackedPredictor(about, tensors)


def sign(rows: FFNRows, threshold: float) -> PackedPredictor:
    """That of these rows, as `pack` makes it."""
    about = Predictor(kind="sign", input="post_norm", threshold=threshold)
    return PackedPredictor(about, {"signs": signs(rows)})


def inputs(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x and residual, on a grid, which the 15 bits that the core gives the x of q4 hold exactly."""
    x, residual = ((64 * random(tokens, HIDDEN, seed=seed)).round() / 64 for seed in (3, 4))
    return x, residual


def forward(
    backend: str,
    predictor: PackedPredictor | None,
    tokens: int,
    *,
    quant: str = "q8",
    activation: str = "drelu",
    mode: ops.Mode = "predicted",
    threads: int = 2,
) -> tuple[torch.Tensor, torch.Tensor]:
    x, residual = inputs(tokens)
    ffn = ops.backend(backend).Neurons(stored(quant), activation, threads, predictor)
    y, counts = ffn.forward(x, residual, mode=mode)
    return y, counts


def clear_threshold(predictor: PackedPredictor, h: torch.Tensor) -> float:
    """One near 0.3 that no logit is close to: the core rounds what a q4 fc2 meets to 15 bits."""
    quant = str(predictor.about.quant)
    fc1 = dequantise(torch.from_numpy(predictor.tensors["fc1"]), quant, HIDDEN)
    fc2 = dequantise(torch.from_numpy(predictor.tensors["fc2"]), quant, len(fc1))
    logits = ((h @ fc1.T).relu() @ fc2.T).flatten().sort().values
    near = logits[(logits > 0.2) & (logits < 0.4)]
    widest = int(near.diff().argmax())
    return float(near[widest : widest + 2].mean())


def relative_rms(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value - truth).norm() / truth.norm().clamp(min=1e-30))


# --- what a threshold means -----------------------------------------------------------------------


@pytest.mark.parametrize("backend", ops.BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["low_rank", "sign"])
def test_a_predictor_that_lets_all_through_equals_exact_mode(
    backend: str, activation: str, kind: str
) -> None:
    predictor = low_rank("q8", 32, -1e30) if kind == "low_rank" else sign(stored("q8"), -1.0)
    y, counts = forward(backend, predictor, 3, activation=activation)
    exact, expected = forward(backend, None, 3, activation=activation, mode="exact")
    assert torch.equal(y, exact)
    assert torch.equal(counts, expected)
    assert (counts[:, 0] == NEURONS).all()


@pytest.mark.parametrize("backend", ops.BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["low_rank", "sign"])
def test_a_predictor_that_lets_none_through_gives_zeros(
    backend: str, activation: str, kind: str
) -> None:
    predictor = low_rank("q8", 32, 1e30) if kind == "low_rank" else sign(stored("q8"), 1.01)
    y, counts = forward(backend, predictor, 3, activation=activation)
    assert torch.equal(y, torch.zeros(3, HIDDEN))
    assert torch.equal(counts, torch.zeros(3, 3, dtype=torch.int32))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_neurons_that_are_no_candidates_add_nothing(activation: str) -> None:
    """The reference against the plain formula with those neurons struck out."""
    x, (gate, up, down) = random(5, HIDDEN), random(3, NEURONS, HIDDEN, seed=1)
    candidates = random(5, NEURONS, seed=2) > 0.5
    y, counts = sparse_ffn(x, gate, up, down, activation, mode="predicted", candidates=candidates)
    g, u = (x.double() @ w.double().T for w in (gate, up))
    formulas = {"drelu": g.relu() * u.relu(), "reglu": g.relu() * u, "relu": u.relu()}
    combined = formulas[activation] * candidates
    first = u if activation == "relu" else g
    assert relative_rms(y, (combined @ down.double()).float()) < SAME_SUM
    expected = [candidates.sum(1), ((first > 0) & candidates).sum(1), combined.ne(0).sum(1)]
    assert counts.tolist() == torch.stack(expected, 1).tolist()


@pytest.mark.parametrize("mode", ["dense", "exact", "predicted"])
@pytest.mark.parametrize("activation", ["drelu", "reglu"])
@pytest.mark.usefixtures("isa")
def test_a_gate_up_to_the_threshold_is_inactive(activation: str, mode: ops.Mode) -> None:
    """FATReLU by hand: the first gates are below, at and above the threshold, the last one NaN."""
    values = torch.tensor([-1.0, 0.125, 0.25, 0.375, 2.0])
    gate, up, down = torch.zeros(3, 5, 32)
    gate[:, 0], up[:, 1], down[:, 0] = values, torch.tensor([1.0, 1, 1, -2, 4]), 1.0
    x = torch.zeros(2, 32)
    x[:, :2] = 1
    x[1, 0] = float("nan")
    expected = {"drelu": (8.0, 1), "reglu": (8 - 0.75, 2)}[activation]
    predictor = low_rank("f16", 32, -1e30, neurons=5, hidden=32) if mode == "predicted" else None
    rows = quantise_ffn(gate, up, down, ("f16",) * 3)
    for backend in ops.BACKENDS:
        ffn = ops.backend(backend).Neurons(rows, activation, 2, predictor, threshold=0.25)
        y, counts = ffn.forward(x, x, mode=mode)
        assert (float(y[0, 0]), counts[0].tolist()) == (expected[0], [5, 2, expected[1]]), backend
        assert y[1].isnan().any(), "a NaN shows"


def test_low_rank_candidates_by_hand() -> None:
    fc1 = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    fc2 = torch.tensor([[2.0, 0.0], [0.0, 2.0], [1.0, -1.0]])
    h = torch.tensor([[3.0, -5.0], [1.0, 1.0], [float("nan"), 0.0]])
    found = low_rank_candidates(h, fc1, fc2, 2.0)  # logits [6, 0, 3], [2, 2, 0], NaN
    assert found.tolist() == [[True, False, True], [True, True, False], [True, True, True]]


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        ("drelu", [True, False, False]),
        ("reglu", [True, True, False]),
        ("relu", [True, False, True]),
    ],
)
def test_sign_candidates_by_hand(activation: str, expected: list[bool]) -> None:
    x = torch.tensor([[1.0, -2.0, 3.0, 0.0]])  # zero is not negative
    agrees, differs = [False, True, False, False], [True, True, True, False]  # scores 1 and 0
    gate = torch.tensor([agrees, agrees, differs])
    up = torch.tensor([agrees, differs, agrees])
    assert sign_candidates(x, gate, up, activation, 0.5)[0].tolist() == expected
    assert sign_candidates(x, gate, up, activation, 0.0).all(), "as much as the threshold is enough"


@pytest.mark.parametrize("cols", [1, 7, 64, 172, 512, 544])
def test_sign_bits_unpack_to_the_signs(cols: int) -> None:
    weights = random(5, cols)
    bits = sign_bits(weights)
    assert bits.shape == (5, -(-cols // 512) * 64)
    assert torch.equal(negative(bits, cols), weights < 0)
    column = cols // 2
    assert bool(bits[3, column // 8] >> column % 8 & 1) == bool(weights[3, column] < 0)


# --- the core against the reference ---------------------------------------------------------------


def assert_core_is_the_reference(predictor: Any, quant: str, tokens: int) -> None:
    for activation in ACTIVATIONS:
        same = {"quant": quant, "activation": activation}
        truth, expected = forward("torch", predictor, tokens, **same)
        assert 0 < expected[:, 0].sum() < tokens * NEURONS
        for threads in (1, 2, 5):
            y, counts = forward("cpu", predictor, tokens, **same, threads=threads)
            assert relative_rms(y, truth) < SAME_SUM
            assert torch.equal(counts, expected)


@pytest.mark.parametrize("tokens", [1, 3, 17])
@pytest.mark.parametrize("predictor_quant", QUANTS)
@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.usefixtures("isa")
def test_low_rank_on_the_core_is_the_reference(
    quant: str, predictor_quant: str, tokens: int
) -> None:
    for rank in (32, 96) if predictor_quant != "f16" else (5, 32):
        for where in ("pre_norm", "post_norm"):
            random_one = low_rank(predictor_quant, rank, 0.3, input=where)
            h = inputs(tokens)[where == "pre_norm"]
            predictor = low_rank(predictor_quant, rank, clear_threshold(random_one, h), input=where)
            assert_core_is_the_reference(predictor, quant, tokens)


def test_the_two_inputs_pick_different_neurons() -> None:
    picked = [
        forward("cpu", low_rank("q8", 32, 0.3, input=i), 3)[0] for i in ("pre_norm", "post_norm")
    ]
    assert relative_rms(*picked) > 0.1


@pytest.mark.parametrize("tokens", [1, 3, 17])
@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.usefixtures("isa")
def test_signs_on_the_core_are_the_reference(quant: str, tokens: int) -> None:
    predictor = sign(stored(quant), 0.05)
    assert_core_is_the_reference(predictor, quant, tokens)


@pytest.mark.parametrize("hidden", [1, 7, 63, 172, 512, 1056])
def test_signs_of_any_width(hidden: int) -> None:
    data = stored("f16", 37, hidden)
    predictor = sign(data, 0.0)
    x = random(5, hidden)
    counts = [
        ops.backend(backend).Neurons(data, "drelu", 1, predictor).forward(x, x, mode="predicted")[1]
        for backend in ops.BACKENDS
    ]
    assert torch.equal(*counts)
    gate, up = (part < 0 for part in dequantise_ffn(data)[:2])
    assert counts[0][:, 0].tolist() == sign_candidates(x, gate, up, "drelu", 0.0).sum(1).tolist()


@pytest.mark.parametrize("kind", ["low_rank", "sign"])
def test_the_core_fills_every_output(kind: str) -> None:
    """NaN from before must not shine through, whatever the candidates."""
    data = stored("q8")
    fc1, fc2 = (random(*shape).numpy() for shape in ((32, HIDDEN), (NEURONS, 32)))
    matrices = [quantise(torch.from_numpy(m), "q8").numpy() for m in (fc1, fc2)]
    if kind == "low_rank":
        first, second = _core.Matrix(matrices[0], HIDDEN, "q8"), _core.Matrix(matrices[1], 32, "q8")
        predictor: _core.Predictor = _core.LowRank(first, second, 5.0, False)
    else:
        predictor = _core.Signs(sign(data, 0).tensors["signs"], HIDDEN, "drelu", 0.1)
    neurons = core_neurons(data, "drelu", predictor)
    x = random(17, HIDDEN).numpy()
    out = np.full(x.shape, np.nan, np.float32)
    counts = np.full((17, 3), -1, np.int32)
    neurons.forward(x, x, out, counts, "predicted", 2)
    assert np.isfinite(out).all()
    assert (counts >= 0).all()
    assert (counts[:, 0] >= counts[:, 1]).all()
    assert (counts[:, 1] >= counts[:, 2]).all()


@pytest.mark.parametrize("backend", ops.BACKENDS)
def test_a_broken_input_shows_in_the_output(backend: str) -> None:
    ffn = ops.backend(backend).Neurons(stored("q8"), "drelu", 1, low_rank("q8", 32, 0.3))
    x = torch.full((1, HIDDEN), torch.nan)
    assert ffn.forward(x, x, mode="predicted")[0].isnan().all()


# --- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ops.BACKENDS)
def test_predicted_mode_needs_a_predictor(backend: str) -> None:
    with pytest.raises(ValueError, match="predicted mode needs a predictor"):
        forward(backend, None, 1)


def test_the_reference_takes_candidates_in_predicted_mode_only() -> None:
    x, weights = random(1, HIDDEN), random(3, NEURONS, HIDDEN)
    some = torch.ones(1, NEURONS, dtype=torch.bool)
    with pytest.raises(ValueError, match="needs candidates"):
        sparse_ffn(x, *weights, "drelu", mode="predicted")
    with pytest.raises(ValueError, match="the other modes take none"):
        sparse_ffn(x, *weights, "drelu", mode="exact", candidates=some)


def matrix(rows: int, cols: int) -> _core.Matrix:
    return _core.Matrix(quantise(random(rows, cols), "q8").numpy(), cols, "q8")


def test_predictors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="fc1 has 32 rows, expected the 64 columns of fc2"):
        _core.LowRank(matrix(32, HIDDEN), matrix(NEURONS, 64), 0.0, False)
    with pytest.raises(ValueError, match=r"bits has shape \(7, 64\), expected \(7, 128\)"):
        _core.Signs(np.zeros((7, 64), np.uint8), HIDDEN, "drelu", 0.0)
    with pytest.raises(ValueError, match="hidden is 0, expected at least 1"):
        _core.Signs(np.zeros((7, 0), np.uint8), 0, "drelu", 0.0)
    for predictor in (
        _core.LowRank(matrix(32, HIDDEN), matrix(NEURONS - 1, 32), 0.0, False),
        _core.Signs(np.zeros((NEURONS, 128), np.uint8), HIDDEN + 32, "drelu", 0.0),
    ):
        with pytest.raises(ValueError, match=f"the predictor is of .* expected {NEURONS} and 96"):
            core_neurons(stored("q8"), "drelu", predictor)
    with pytest.raises(TypeError, match="incompatible"):
        core_neurons(stored("q8"), "drelu", "sign")  # type: ignore[arg-type]


def test_the_weights_live_as_long_as_the_neurons() -> None:
    import gc
    import weakref

    arrays = [quantise(random(*s), "q8").numpy() for s in ((32, HIDDEN), (NEURONS, 32))]
    alive = [weakref.ref(array) for array in arrays]
    fc1, fc2 = _core.Matrix(arrays[0], HIDDEN, "q8"), _core.Matrix(arrays[1], 32, "q8")
    neurons = core_neurons(stored("q8"), "drelu", _core.LowRank(fc1, fc2, 0.0, False))
    del fc1, fc2, arrays
    gc.collect()
    assert all(ref() is not None for ref in alive)
    del neurons
    gc.collect()
    assert all(ref() is None for ref in alive)
