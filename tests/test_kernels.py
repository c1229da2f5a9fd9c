"""Every kernel on every instruction set of this machine against the reference in float64.

The axes of the matrix are the lists below; formats and activations are those of the program.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from turbosparse import _core
from turbosparse.hf.activations import ACTIVATIONS, WITHOUT_ZEROS
from turbosparse.hf.ffn_activation import combined
from turbosparse.ops.native import neurons as core_neurons
from turbosparse.ops.predictor import PackedPredictor, Predictor
from turbosparse.ops.quant import dequantise, dequantise_ffn, quantise, quantise_ffn, signs
from turbosparse.ops.reference import Neurons, sparse_ffn
from turbosparse.ops.rows import BLOCK, QUANTS, FFNRows, row_bytes

ROUNDED = ("q4", "q4_0")  # their products round x to 15 bits
BITS = {"f16": 0, "q8": 8, "q4": 4, "q4_0": 4}  # of a weight, before the halves of a row
CALLS = [(1, 1), ONE := (1, 5), (3, 2), (18, 1), BATCH := (40, 5)]  # tokens, threads
TOKENS = max(tokens for tokens, _ in CALLS)
ODD = (1, 7, 63, 172)  # widths that only f16 can have
WIDTHS = [(quant, cols) for quant in QUANTS for cols in (32, 96, 512, 544, 1056)]
WIDTHS += [("f16", cols) for cols in ODD]
# of gate, up, down and predictor: all the same, or all different
SAME = [(quant,) * 4 for quant in QUANTS]
MIXED = [tuple(QUANTS[(at + i) % len(QUANTS)] for i in range(4)) for at in range(len(QUANTS))]
SIZES = [(1, 32), (7, 96), (63, 512), (203, 1056), (1023, 64)]  # neurons, hidden
FFNS = [(quants, *size) for quants in SAME for size in SIZES]
FFNS += [(quants, 203, 544) for quants in MIXED]
FFNS += [(("f16",) * 4, 63, hidden) for hidden in ODD]
ACTIVE = ("none", "one", "some", "all")  # neurons of the first token
# and a threshold, of FATReLU, that some gates are near to
FORMULAS = [(name, 0.0) for name in ACTIVATIONS]
FORMULAS += [(name, 4.0) for name, record in ACTIVATIONS.items() if record.cuts]
# csrc/matrix.cpp has the formulas once for all formats, instruction sets and sizes. So each meets
# each mode and set of neurons at one size; at the others one with a gate, one without and one with
# a threshold will do.
FEW = [("drelu", 0.0), ("relu2", 0.0), ("reglu", 4.0)]
MANY = (63, 512)
WITH_ZEROS = [name for name in ACTIVATIONS if name not in WITHOUT_ZEROS]
MODES = {  # of the core, the kind of predictor and what it reads
    "dense": ("dense", None, None),
    "exact": ("exact", None, None),
    "low_rank of x": ("predicted", "low_rank", "post_norm"),
    "low_rank of residual": ("predicted", "low_rank", "pre_norm"),
    "sign": ("predicted", "sign", "post_norm"),
}
SAME_SUM = 2e-5  # relative RMS of a feed-forward in float32, in which terms cancel
HALVES = np.arange(2**16, dtype=np.uint16)
HALVES = HALVES[np.isfinite(HALVES.view(np.float16))]


@pytest.fixture(autouse=True, params=_core.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _core.isa()
    _core.set_isa(request.param)
    yield request.param
    _core.set_isa(before)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(got: torch.Tensor, expected: torch.Tensor, size: torch.Tensor | None = None) -> float:
    """Relative to `size`, where sums may cancel; else to `expected` itself. NaN for NaN."""
    norm = (expected if size is None else size).double().norm().clamp(min=1e-30)
    return float((got.double() - expected.double()).norm() / norm)


def product_error(quant: str) -> float:
    return 1e-4 if quant in ROUNDED else 1e-6


# -- matrices ------------------------------------------------------------------------------------


@cache
def packed(rows: int, cols: int, quant: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as bytes, and the weights that they stand for in float64."""
    data = quantise(normal(rows, cols) / cols**0.5, quant)
    return data, dequantise(data, quant, cols).double()


def matmul(data: torch.Tensor, quant: str, x: torch.Tensor, threads: int = 2) -> torch.Tensor:
    matrix = _core.Matrix(data.numpy(), x.shape[1], quant)
    out = torch.full((len(x), len(data)), torch.nan)
    matrix.matmul(x.numpy(), out.numpy(), threads)
    return out


@pytest.mark.parametrize("rows", [1, 7, 63, 1023])
@pytest.mark.parametrize(("quant", "cols"), WIDTHS)
def test_matmul(quant: str, cols: int, rows: int) -> None:
    data, weights = packed(rows, cols, quant)
    x = normal(TOKENS, cols, seed=1)
    truth = x.double() @ weights.T
    size = (x.double() ** 2 @ weights.T**2).sqrt()  # of such sums when their signs are random
    for tokens, threads in CALLS:
        got = matmul(data, quant, x[:tokens], threads)
        assert error(got, truth[:tokens], size[:tokens]) <= product_error(quant), (tokens, threads)


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("cols", [32, 544, 4128])
def test_a_product_is_the_same_beside_any_others(quant: str, cols: int) -> None:
    data, _ = packed(71, cols, quant)
    x = normal(TOKENS + 14, cols, seed=1)
    alone = torch.cat([matmul(data, quant, token[None]) for token in x])
    for tokens in (2, 3, 4, 7, len(x)):
        assert torch.equal(matmul(data, quant, x[:tokens]), alone[:tokens]), tokens


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("tokens", [1, 40])
def test_long_products_with_outliers(quant: str, tokens: int) -> None:
    data, weights = packed(255, 4096, quant)
    x = normal(tokens, 4096, seed=1)
    x[:, ::32] *= 100  # one in each group
    assert error(matmul(data, quant, x), x.double() @ weights.T) <= product_error(quant)


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-30, 1e-10, 1e10, 1e30])
def test_x_of_any_size(quant: str, size: float) -> None:
    data, weights = packed(7, 544, quant)
    x = (normal(1, 544, seed=1).double() * size).float()
    x[0, :32] = 0
    got = matmul(data, quant, x)
    assert got.isfinite().all()
    if size >= 1e-30:
        scaled = error(got.double() / size, x.double() / size @ weights.T)
        assert scaled <= max(SAME_SUM, product_error(quant))


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("tokens", [1, 40])
def test_what_is_not_finite_is_not_hidden(quant: str, value: float, tokens: int) -> None:
    data, weights = packed(63, 544, quant)
    for position in (0, 300, 543):
        x = normal(tokens, 544, seed=1)
        x[0, position] = value
        out = matmul(data, quant, x)
        assert not out[0, weights[:, position] != 0].isfinite().any()
        assert out[1:].isfinite().all()


@pytest.mark.parametrize("quant", [quant for quant in QUANTS if BITS[quant]])
@pytest.mark.parametrize("byte", [0x00, 0x7F, 0x80, 0xFF])
def test_the_ends_of_the_codes(quant: str, byte: int) -> None:
    """With the largest x: where narrow integers would overflow."""
    data = quantise(torch.ones(7, 544), quant)
    data[:, : 544 * BITS[quant] // 8] = byte
    weights = dequantise(data, quant, 544).double()
    for value in (1.0, -1.0, 1 - 2.0**-22, -(2 - 2.0**-20)):
        x = torch.full((1, 544), value)
        assert error(matmul(data, quant, x), x.double() @ weights.T) <= product_error(quant)


def test_rows_at_the_end_of_the_mapping(tmp_path: Path) -> None:
    """Nothing behind the last row is touched: the file ends where a page does."""
    for quant in QUANTS:
        data, weights = packed(256, 1024 if quant == "f16" else 1056, quant)
        rows = 4096 // int(np.gcd(4096, data.shape[1]))  # at most 256, as strides are of 16 bytes
        data[:rows].numpy().tofile(tmp_path / quant)
        mapped = torch.from_numpy(np.memmap(tmp_path / quant, np.uint8, mode="c"))
        x = normal(1, weights.shape[1], seed=1)
        got = matmul(mapped.reshape(rows, -1), quant, x)
        assert error(got, x.double() @ weights[:rows].T) <= product_error(quant)


# -- dequantise ----------------------------------------------------------------------------------


def assert_rows_are_exact(quant: str, halves: np.ndarray) -> None:
    """Of any payload, with these halves [rows, n]: the weights of f16, else the scales."""
    count, cols = len(halves), halves.shape[1] * (BLOCK if BITS[quant] else 1)
    payload = np.random.default_rng(0).integers(0, 256, (count, cols * BITS[quant] // 8), np.uint8)
    data = np.zeros((count, row_bytes(quant, cols)), np.uint8)
    data[:, : payload.shape[1] + halves.nbytes // count] = np.hstack((payload, halves.view("u1")))
    matrix = _core.Matrix(data, cols, quant)
    assert (matrix.rows, matrix.cols, matrix.quant) == (count, cols, quant)
    for index, expected in enumerate(dequantise(torch.from_numpy(data), quant, cols).numpy()):
        out = np.full(cols, np.nan, np.float32)
        matrix.row(index, out)
        np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(("quant", "cols"), WIDTHS)
def test_dequantise(quant: str, cols: int) -> None:
    halves = (7, cols // BLOCK if BITS[quant] else cols)
    assert_rows_are_exact(quant, np.random.default_rng(1).choice(HALVES, halves))


@pytest.mark.parametrize("quant", QUANTS)
def test_every_finite_half(quant: str) -> None:
    assert_rows_are_exact(quant, HALVES[None])


# -- feed-forwards -------------------------------------------------------------------------------


class FFN(NamedTuple):
    """A random one, and tokens for it that are on a grid: 15 bits hold them exactly."""

    rows: FFNRows
    weights: tuple[torch.Tensor, ...]  # gate, up, down in float64
    x: torch.Tensor
    residual: torch.Tensor

    def read_by(self, activation: str) -> FFNRows:
        count = len(ACTIVATIONS[activation].parts)
        return FFNRows.join(self.rows.split()[-count:], self.rows.hidden, self.rows.quants[-count:])


@cache
def random_ffn(quants: tuple[str, ...], neurons: int, hidden: int, active: str) -> FFN:
    """Weights lean so that the first token activates these; the second the others; the third none.

    The tokens after them repeat that. No pre-activation comes near zero, so that counts are exact.
    """
    chosen = {
        "none": torch.zeros(neurons, dtype=torch.bool),
        "one": torch.arange(neurons) == neurons // 2,
        "some": normal(neurons, seed=1) > 1.3,
        "all": torch.ones(neurons, dtype=torch.bool),
    }[active]
    lean = torch.where(chosen, 6.0, -6.0)[:, None] / hidden
    gate, up, down = normal(3, neurons, hidden) / hidden**0.5
    rows = quantise_ffn((gate + lean, up + lean, down), quants[:3])
    sign = torch.tensor([1.0, -1.0, 0.0]).repeat(TOKENS)[:TOKENS, None]
    x, residual = ((64 * normal(TOKENS, hidden, seed=seed)).round() / 64 for seed in (2, 3))
    weights = tuple(part.double() for part in dequantise_ffn(rows))
    return FFN(rows, weights, (1 + x) * sign, residual)


def make_predictor(kind: str, reads: str, quant: str, ffn: FFN, activation: str) -> PackedPredictor:
    """One that lets some neurons through, with a threshold that no score comes near."""
    if kind == "sign":
        about = Predictor(kind="sign", input="post_norm", threshold=0.05)
        bits = signs(ffn.read_by(activation), len(ACTIVATIONS[activation].zero_by))
        return PackedPredictor(about, {"signs": bits})
    rank, hidden = 96 if BITS[quant] else 5, ffn.rows.hidden
    fc1 = quantise(normal(rank, hidden, seed=4) / hidden**0.5, quant)
    fc2 = quantise(normal(len(ffn.rows.gates), rank, seed=5) / rank**0.5, quant)
    h = ffn.residual if reads == "pre_norm" else ffn.x
    logits = (h @ dequantise(fc1, quant, hidden).T).relu() @ dequantise(fc2, quant, rank).T
    near = torch.cat((torch.tensor([0.2, 0.4]), logits[(logits > 0.2) & (logits < 0.4)]))
    near = near.sort().values
    widest = int(near.diff().argmax())
    about = Predictor(
        kind="low_rank",
        input=reads,  # type: ignore[arg-type]
        threshold=float(near[widest : widest + 2].mean()),
        quant=quant,  # type: ignore[arg-type]
        ranks=[[rank]],
    )
    return PackedPredictor(about, {"fc1": fc1.numpy(), "fc2": fc2.numpy()})


def forward(
    neurons: _core.Neurons, x: torch.Tensor, residual: torch.Tensor, mode: str, threads: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.full(x.shape, torch.nan)
    counts = torch.full((len(x), 3), -1, dtype=torch.int32)
    neurons.forward(x.numpy(), residual.numpy(), out.numpy(), counts.numpy(), mode, threads)
    return out, counts


@cache
def truth(
    quants: tuple[str, ...],
    neurons: int,
    hidden: int,
    active: str,
    mode: str,
    activation: str,
    threshold: float,
) -> tuple[PackedPredictor | None, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The predictor, what all tokens give in float64, and of such sums the usual size."""
    ffn = random_ffn(quants, neurons, hidden, active)
    core_mode, kind, reads = MODES[mode]
    predictor = kind and make_predictor(kind, reads, quants[3], ffn, activation)
    find = Neurons(ffn.read_by(activation), activation, 1, predictor).candidates
    candidates = find and find(ffn.x, ffn.residual)
    if candidates is not None and neurons > 7:
        assert 0 < candidates.sum() < candidates.numel()
    y, counts = sparse_ffn(
        ffn.x.double(),
        *ffn.weights,
        activation,
        mode=core_mode,
        candidates=candidates,
        threshold=threshold,
    )
    gate, up, down = ffn.weights
    active = combined(ffn.x.double() @ gate.T, ffn.x.double() @ up.T, activation, threshold)
    active = active if candidates is None else active * candidates
    return predictor, y, (active**2 @ down**2).sqrt(), counts


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("quants", "neurons", "hidden"), FFNS)
def test_feed_forward(quants: tuple[str, ...], neurons: int, hidden: int, mode: str) -> None:
    for active in ACTIVE:
        ffn = random_ffn(quants, neurons, hidden, active)
        for activation, threshold in FORMULAS if (neurons, hidden) == MANY else FEW:
            if mode != "dense" and activation in WITHOUT_ZEROS:
                continue
            where = active, activation, threshold
            predictor, expected, size, expected_counts = truth(
                quants, neurons, hidden, active, mode, activation, threshold
            )
            core = core_neurons(ffn.read_by(activation), activation, predictor, threshold)
            known = 2 if activation in WITHOUT_ZEROS else 3  # what is tiny may be zero or not
            for tokens, threads in CALLS if activation == "drelu" else (ONE, BATCH):
                x, residual = ffn.x[:tokens], ffn.residual[:tokens]
                got, counts = forward(core, x, residual, MODES[mode][0], threads)
                off = error(got, expected[:tokens], size[:tokens])
                assert off <= SAME_SUM, (*where, tokens, threads)
                assert torch.equal(counts[:, :known], expected_counts[:tokens, :known]), where


SHARED = (("q8",) * 4, 1023, 96, "some")  # large enough for five threads


@pytest.mark.parametrize("activation", WITH_ZEROS)
def test_a_threshold_that_lets_all_or_none_through(activation: str) -> None:
    ffn = random_ffn(*SHARED)
    rows = ffn.read_by(activation)
    exact, expected = forward(core_neurons(rows, activation), ffn.x, ffn.residual, "exact")
    for kind in ("low_rank", "sign"):
        about, tensors = make_predictor(kind, "post_norm", "q8", ffn, activation)
        for threshold in (-1e30, 1e30):
            predictor = PackedPredictor(about.model_copy(update={"threshold": threshold}), tensors)
            core = core_neurons(rows, activation, predictor)
            got, counts = forward(core, ffn.x, ffn.residual, "predicted")
            assert torch.equal(got, exact * (threshold < 0))
            assert torch.equal(counts, expected * (threshold < 0))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_same_threads_same_bits(threads: int) -> None:
    ffn = random_ffn(*SHARED)
    core = core_neurons(ffn.rows, "drelu")
    first, *others = (forward(core, ffn.x, ffn.residual, "exact", threads)[0] for _ in range(5))
    assert all(torch.equal(other, first) for other in others)


def test_the_first_neurons_are_a_feed_forward_of_their_own() -> None:
    """A hot part elsewhere in memory and the cold rest add up to the whole."""
    ffn = random_ffn(*SHARED)
    core = core_neurons(ffn.rows, "drelu")
    whole, counts = forward(core, ffn.x, ffn.residual, "exact")
    hot, cold = (
        forward(core_neurons(ffn.rows[part], "drelu"), ffn.x, ffn.residual, "exact")
        for part in (slice(20), slice(20, None))
    )
    assert error(hot[0] + cold[0], whole) <= SAME_SUM
    assert torch.equal(hot[1] + cold[1], counts)


@pytest.mark.parametrize("activation", WITH_ZEROS)
def test_nan_is_not_hidden(activation: str) -> None:
    ffn = random_ffn(*SHARED)
    x = torch.full((1, 96), torch.nan)
    predictor = make_predictor("low_rank", "post_norm", "q8", ffn, activation)
    core = core_neurons(ffn.read_by(activation), activation, predictor)
    for mode in ("dense", "exact", "predicted"):
        assert forward(core, x, x, mode)[0].isnan().all(), mode


@pytest.mark.parametrize("activation", [a for a in WITH_ZEROS if ACTIVATIONS[a].gated])
def test_exact_mode_reads_no_up_row_behind_a_closed_gate(activation: str) -> None:
    """relu(-inf) * inf is NaN where the up row is read, and 0 where it is not."""
    opened = torch.ones(1, 32)
    core = core_neurons(quantise_ffn((-opened, opened, opened), ("f16",) * 3), activation)
    x = torch.full((1, 32), torch.inf)
    assert forward(core, x, x, "dense")[0].isnan().all()
    assert (forward(core, x, x, "exact")[0] == 0).all()
