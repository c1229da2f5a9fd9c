"""Every instruction set of this machine against float64, on the shapes that kernels get wrong."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from turbosparse import _core
from turbosparse.ops.quant import dequantise, quantise
from turbosparse.ops.rows import FFNRows

SUM = {"f16": 2e-5, "q8": 2e-5, "q4": 1e-4}  # relative RMS; q4 rounds x to 15 bits
LONG_SUM = {"f16": 1e-6, "q8": 1e-6, "q4": 1e-4}  # of 4096 random terms with outliers

QUANTS = ["f16", "q8", "q4"]
SHAPES = [(quant, cols) for quant in QUANTS for cols in (32, 96, 512, 544, 1056, 4096)]
SHAPES += [("f16", cols) for cols in (1, 7, 63, 172)]
TOKENS = [1, 2, 3, 17, 40]


@pytest.fixture(autouse=True, params=_core.available_isas())
def isa(request):
    before = _core.isa()
    _core.set_isa(request.param)
    yield request.param
    _core.set_isa(before)


def packed(rows, cols, quant, seed=0):
    """Rows as bytes, and the weights that they stand for."""
    generator = torch.Generator().manual_seed(seed)
    data = quantise(torch.randn(rows, cols, generator=generator) / cols**0.5, quant)
    return data.numpy(), dequantise(data, quant, cols).double().numpy()


def inputs(tokens, cols, seed=0):
    return np.random.default_rng(seed).standard_normal((tokens, cols), np.float32)


def matmul(matrix, x, threads=2):
    out = np.full((len(x), matrix.rows), np.nan, np.float32)
    matrix.matmul(x, out, threads)
    return out


def forward(neurons, x, mode, threads=2):
    out = np.full(x.shape, np.nan, np.float32)
    counts = np.full((len(x), 3), -1, np.int32)
    neurons.forward(x, x, out, counts, mode, threads)
    return out, counts


def drelu_ffn(neurons, hidden, quant, active):
    """Rows, and the function they compute; a positive x has the `active` neurons active."""
    sign = np.where(active, 1, -1)[:, None]
    parts = [packed(neurons, hidden, quant, seed) for seed in range(3)]
    gate, up = (
        quantise(torch.tensor(np.abs(weights) * sign), quant).numpy() for _, weights in parts[:2]
    )
    data = [gate, up, parts[2][0]]
    weights = [dequantise(torch.tensor(d), quant, hidden).double().numpy() for d in data]

    def truth(x):
        x = x.astype(np.float64)
        combined = np.maximum(x @ weights[0].T, 0) * np.maximum(x @ weights[1].T, 0)
        return combined @ weights[2]

    return FFNRows.join(data, hidden, (quant,) * 3), truth


def drelu_neurons(rows):
    return _core.Neurons(rows.gates, rows.pairs, rows.hidden, rows.quants, "drelu")


def relative_rms(value, truth):
    return np.linalg.norm(value - truth) / max(np.linalg.norm(truth), 1e-30)


# -- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("quant", "cols"), SHAPES)
def test_matmul(quant, cols):
    for rows in (1, 7, 63, 1023):
        data, weights = packed(rows, cols, quant)
        matrix = _core.Matrix(data, cols, quant)
        for tokens in TOKENS:
            x = inputs(tokens, cols)
            size = np.sqrt(x**2 @ weights.T**2)  # of such sums: some of one row cancel
            error = np.linalg.norm(matmul(matrix, x) - x @ weights.T) / np.linalg.norm(size)
            assert error <= SUM[quant], (rows, tokens)


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("tokens", [1, 40])
def test_long_products(quant, tokens):
    data, weights = packed(1023, 4096, quant)
    x = inputs(tokens, 4096)
    x[:, ::32] *= 100  # outliers, one in each group
    got = matmul(_core.Matrix(data, 4096, quant), x)
    assert relative_rms(got, x @ weights.T) <= LONG_SUM[quant]


@pytest.mark.parametrize(("quant", "cols"), SHAPES)
def test_rows(quant, cols):
    data, weights = packed(7, cols, quant)
    matrix = _core.Matrix(data, cols, quant)
    for index, expected in enumerate(weights):
        out = np.full(cols, np.nan, np.float32)
        matrix.row(index, out)
        np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0, "one"])
@pytest.mark.parametrize(("quant", "cols"), [s for s in SHAPES if s[1] in (7, 96, 544, 1056)])
def test_ffn(quant, cols, share):
    rng = np.random.default_rng(0)
    for neurons in (1, 7, 63, 1023):
        active = (
            np.arange(neurons) == neurons // 2 if share == "one" else rng.random(neurons) < share
        )
        stored, truth = drelu_ffn(neurons, cols, quant, active)
        ffn = drelu_neurons(stored)
        for tokens in TOKENS:
            x = np.abs(inputs(tokens, cols)) + np.float32(0.1)
            for mode in ("dense", "exact"):
                out, counts = forward(ffn, x, mode)
                assert relative_rms(out, truth(x)) <= SUM[quant], (neurons, tokens, mode)
                assert (counts[:, 0] == neurons).all()
                assert (counts[:, 1:] == active.sum()).all()


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("quant", QUANTS)
def test_a_token_does_not_depend_on_the_others_need(quant, tokens):
    stored, truth = drelu_ffn(63, 96, quant, np.arange(63) % 5 == 0)
    x = np.abs(inputs(tokens, 96)) * np.resize(np.float32([1, -1, 0]), tokens)[:, None]
    out, counts = forward(drelu_neurons(stored), x, "exact")
    assert relative_rms(out, truth(x)) <= SUM[quant]
    assert counts[:3].tolist() == [[63, 13, 13], [63, 50, 50], [63, 0, 0]]


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-30, 1e-10, 1e10, 1e30])
def test_x_of_any_size(quant, size):
    data, weights = packed(7, 544, quant)
    x = (inputs(1, 544) * size).astype(np.float32)
    x[0, :32] = 0
    got = matmul(_core.Matrix(data, 544, quant), x)
    assert np.isfinite(got).all()
    if size >= 1e-30:
        assert relative_rms(got.astype(np.float64) / size, x / size @ weights.T) <= SUM[quant]


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tokens", [1, 40])
def test_what_is_not_finite_is_not_hidden(quant, value, tokens):
    data, _ = packed(63, 544, quant)
    for position in (0, 300, 543):
        x = inputs(tokens, 544)
        x[0, position] = value
        out = matmul(_core.Matrix(data, 544, quant), x)
        weight = np.zeros((1, 544), np.float32)
        weight[0, position] = 1
        touched = matmul(_core.Matrix(data, 544, quant), weight)[0] != 0
        assert not np.isfinite(out[0, touched]).any()
        assert np.isfinite(out[1:]).all()


@pytest.mark.parametrize("quant", QUANTS)
def test_the_smallest_byte_of_q8_and_the_ends_of_q4(quant):
    """-128 and the ends of the nibbles with the largest x: where narrow integers would overflow."""
    codes = np.resize([-8, 7, -8, -8] if quant == "q4" else [-128, 127, -128, -128], (7, 544))
    ones = np.ones((7, 17), np.float16).view(np.uint8)
    if quant == "f16":
        payload = codes.astype(np.float16).view(np.uint8)
    elif quant == "q8":
        payload = np.concatenate([codes.astype(np.int8).view(np.uint8), ones], 1)
    else:
        data = quantise(torch.tensor(codes, dtype=torch.float32), "q4").numpy()
        np.testing.assert_array_equal(dequantise(torch.tensor(data), "q4", 544).numpy(), codes)
        payload = data
    step = 64 if quant == "f16" else 16
    data = np.pad(payload, ((0, 0), (0, -payload.shape[1] % step)))
    for x in (1.0, -1.0, 1 - 2.0**-22, -(2 - 2.0**-20)):
        x = np.full((1, 544), x, np.float32)
        got = matmul(_core.Matrix(data, 544, quant), x)
        assert relative_rms(got, x.astype(np.float64) @ codes.T) <= LONG_SUM[quant]


def test_rows_at_the_end_of_the_mapping(tmp_path):
    """Nothing behind the last row is touched: the file ends where a page does."""
    for quant in QUANTS:
        data, weights = packed(64, 1056 if quant != "f16" else 1024, quant)
        cols = weights.shape[1]
        rows = 4096 // np.gcd(4096, data.shape[1])
        data = np.resize(data, (rows, data.shape[1]))
        data.tofile(tmp_path / quant)
        mapped = np.memmap(tmp_path / quant, np.uint8, mode="r").reshape(data.shape)
        x = inputs(1, cols)
        got = matmul(_core.Matrix(mapped, cols, quant), x)
        assert relative_rms(got, x @ np.resize(weights, (rows, cols)).T) <= SUM[quant]


# -- the instruction sets ------------------------------------------------------------------------


def test_the_reference_is_everywhere(isa):
    assert _core.available_isas()[-1] == "ref"
    assert _core.isa() == isa


def test_an_unknown_instruction_set_is_named():
    before = _core.isa()
    with pytest.raises(ValueError, match=r"TURBOSPARSE_ISA\) is 'mmx', this machine has .*ref"):
        _core.set_isa("mmx")
    assert _core.isa() == before


@pytest.mark.parametrize("name", ["ref", "mmx"])
def test_the_environment_names_one(name):
    code = "from turbosparse import _core; print(_core.isa())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TURBOSPARSE_ISA": name},
        capture_output=True,
        text=True,
        check=False,
    )
    if name == "ref":
        assert done.stdout == "ref\n"
    else:
        assert "ValueError: the instruction set (TURBOSPARSE_ISA) is 'mmx'" in done.stderr
