"""The C++ core against numpy, with encoders of the row formats written independently of it."""

import gc
import math
import weakref

import numpy as np
import pytest

from turbosparse import _core
from turbosparse.hf.activations import WITHOUT_ZEROS

TOLERANCE = {"f16": 1e-6, "q8": 1e-6, "q4": 1e-4}  # relative RMS; q4 rounds x to 15 bits

QUANTS = ["f16", "q8", "q4"]
ACTIVATIONS = ["drelu", "geglu", "reglu", "relu", "swiglu"]
CASES = [(quant, cols) for quant in QUANTS for cols in (32, 96, 512, 544, 1056)]
CASES += [("f16", cols) for cols in (1, 7, 63, 172)]
HALVES = np.arange(2**16, dtype=np.uint16).view(np.float16)
HALVES = HALVES[np.isfinite(HALVES)]


# -- the formats ---------------------------------------------------------------------------------


def pad(*parts, step=16):
    """Joins byte arrays [rows, n] and fills the rows up to a multiple of `step` bytes."""
    payload = np.concatenate([part.view(np.uint8) for part in parts], axis=1)
    return np.pad(payload, ((0, 0), (0, -payload.shape[1] % step)))


def q4_nibbles(codes):
    """codes [rows, cols] in -8..7 -> bytes [rows, cols / 2] in tiles of 16 groups of 32."""
    tiles = []
    for start in range(0, codes.shape[1], 512):
        tile = (codes[:, start : start + 512] + 8).astype(np.uint8)
        low, high = np.moveaxis(tile.reshape(len(codes), -1, 2, 16), 2, 0)
        words = (low | high << 4).reshape(len(codes), -1, 4, 4)  # row, group, word, byte
        tiles.append(words.swapaxes(1, 2).reshape(len(codes), -1))
    return np.concatenate(tiles, axis=1)


def encode(quant, codes, scales):
    """codes [rows, cols], scales [rows, cols / 32] -> bytes [rows, stride]."""
    if quant == "f16":
        return pad(decode(codes, scales).astype(np.float16), step=64)
    return pad(q4_nibbles(codes) if quant == "q4" else codes.astype(np.int8), scales)


def decode(codes, scales):
    """The weights [rows, cols] that codes and scales stand for; the last group may be short."""
    return np.repeat(scales.astype(np.float32), 32, axis=1)[:, : codes.shape[1]] * codes


def ffn_rows(gate, up, down):
    """Gate rows; and of each neuron its up row and its down column."""
    return gate, np.concatenate([up, down], 1)


def neurons_of(stored, hidden, quant, activation):
    return _core.Neurons(*stored, hidden, [quant] * 3, activation)


def random_rows(rng, rows, cols, sign=None):
    """Codes that fit all formats, and powers of two as scales; `sign` [rows] makes them ±1..7."""
    codes = rng.integers(-8, 8, (rows, cols))
    if sign is not None:
        codes = np.clip(np.abs(codes), 1, 7) * sign[:, None]
    scales = (2.0 ** rng.integers(-9, -5, (rows, -(-cols // 32)))).astype(np.float16)
    return codes, scales


# -- helpers -------------------------------------------------------------------------------------


def assert_close(got, expected, quant, size=None):
    """`size`: what the error is relative to, where sums may cancel; else `expected` itself."""
    error = np.linalg.norm(got - expected)
    assert error <= TOLERANCE[quant] * np.linalg.norm(expected if size is None else size)


def matmul(matrix, x, threads=1):
    out = np.full((len(x), matrix.rows), np.nan, np.float32)
    matrix.matmul(x, out, threads)
    return out


def read_row(matrix, index):
    out = np.full(matrix.cols, np.nan, np.float32)
    matrix.row(index, out)
    return out


def forward(neurons, x, mode, threads=1):
    out = np.full(x.shape, np.nan, np.float32)
    counts = np.full((len(x), 3), -1, np.int32)
    neurons.forward(x, x, out, counts, mode, threads)
    return out, counts


def random_ffn(rng, quant, neurons, hidden, active=None):
    """Rows (gates, pairs) and the weights (gate, up, down).

    With `active` [neurons] a positive x has positive gates and ups for those neurons only.
    """
    sign = None if active is None else np.where(active, 1, -1)
    parts = [random_rows(rng, neurons, hidden, s) for s in (sign, sign, None)]
    return ffn_rows(*(encode(quant, *p) for p in parts)), [decode(*p) for p in parts]


def reference_ffn(activation, gate_weights, up_weights, down_weights, x):
    def relu(v):
        return np.maximum(v, 0)

    x = x.astype(np.float64)
    gate, up = x @ gate_weights.T, x @ up_weights.T
    if activation == "drelu":
        combined = relu(gate) * relu(up)
    elif activation == "geglu":
        combined = gate * 0.5 * (1 + np.vectorize(math.erf)(gate / math.sqrt(2))) * up
    elif activation == "reglu":
        combined = relu(gate) * up
    elif activation == "relu":
        gate, combined = up, relu(up)
    else:
        combined = gate / (1 + np.exp(-gate)) * up
    counts = [np.full(len(x), gate.shape[1]), (gate > 0).sum(1), (combined != 0).sum(1)]
    return combined @ down_weights, np.stack(counts, 1)


def integer_x(rng, tokens, hidden, low):
    """Small integers: with weights k * 2^-9 the pre-activations are exact, and so the counts."""
    return rng.integers(low, 4, (tokens, hidden)).astype(np.float32)


def check_ffn(activation, quant, stored, weights, x, threads=1):
    neurons = neurons_of(stored, x.shape[1], quant, activation)
    expected, expected_counts = reference_ffn(activation, *weights, x)
    for mode in ("dense",) if activation in WITHOUT_ZEROS else ("dense", "exact"):
        out, counts = forward(neurons, x, mode, threads)
        assert_close(out, expected, quant)
        exact = 2 if activation == "geglu" else 3  # gelu is zero in float far below zero
        np.testing.assert_array_equal(counts[:, :exact], expected_counts[:, :exact])
    return expected_counts


# -- rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("quant", "cols"), CASES)
def test_rows_decode_exactly(quant, cols):
    codes, scales = random_rows(np.random.default_rng(cols), 7, cols)
    matrix = _core.Matrix(encode(quant, codes, scales), cols, quant)
    assert (matrix.rows, matrix.cols, matrix.quant) == (7, cols, quant)
    for index, expected in enumerate(decode(codes, scales)):
        np.testing.assert_array_equal(read_row(matrix, index), expected)


def test_every_finite_half_decodes_exactly():
    matrix = _core.Matrix(pad(HALVES[None]), len(HALVES), "f16")
    expected = HALVES.astype(np.float32)
    np.testing.assert_array_equal(read_row(matrix, 0).view(np.int32), expected.view(np.int32))


@pytest.mark.parametrize("quant", ["q8", "q4"])
def test_every_finite_half_is_an_exact_scale(quant):
    codes = np.tile(np.arange(-8, 8), (1, 2 * len(HALVES)))
    matrix = _core.Matrix(encode(quant, codes, HALVES[None]), codes.size, quant)
    np.testing.assert_array_equal(read_row(matrix, 0), decode(codes, HALVES[None])[0])


def test_q8_uses_the_whole_range_of_int8():
    codes = np.arange(-128, 128)[None]
    scales = np.full((1, 8), 0.1, np.float16)
    matrix = _core.Matrix(encode("q8", codes, scales), 256, "q8")
    np.testing.assert_array_equal(read_row(matrix, 0), decode(codes, scales)[0])


@pytest.mark.parametrize("cols", [32, 544, 1056])
def test_q4_nibbles_lie_where_the_format_says(cols):
    for weight in range(cols):
        group, j = divmod(weight, 32)
        tile, g = divmod(group, 16)
        groups_in_tile = min(16, cols // 32 - 16 * tile)
        r, b = divmod(j % 16, 4)
        nibbles = np.full((1, cols // 2), 0x88, np.uint8)  # all weights 0
        nibbles[0, 256 * tile + 4 * groups_in_tile * r + 4 * g + b] = 0x98 if j >= 16 else 0x89
        matrix = _core.Matrix(pad(nibbles, np.ones((1, cols // 32), np.float16)), cols, "q4")
        np.testing.assert_array_equal(np.flatnonzero(read_row(matrix, 0)), [weight])


# -- Matrix --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 7, 63, 1023])
@pytest.mark.parametrize(("quant", "cols"), CASES)
def test_matmul(quant, cols, rows):
    rng = np.random.default_rng(rows)
    codes, scales = random_rows(rng, rows, cols)
    matrix = _core.Matrix(encode(quant, codes, scales), cols, quant)
    for tokens in (1, 3):
        x = rng.standard_normal((tokens, cols), np.float32)
        weights = decode(codes, scales).astype(np.float64)
        size = np.sqrt(x**2 @ weights.T**2)  # of such sums when the signs of their terms are random
        for threads in (1, 2, 5):
            assert_close(matmul(matrix, x, threads), x @ weights.T, quant, size)


def test_no_rows_and_no_tokens():
    empty = _core.Matrix(np.zeros((0, 32), np.uint8), 32, "q4")
    assert matmul(empty, np.ones((3, 32), np.float32)).shape == (3, 0)
    matrix = _core.Matrix(np.zeros((7, 32), np.uint8), 32, "q4")
    assert matmul(matrix, np.ones((0, 32), np.float32)).shape == (0, 7)


# -- Neurons -------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("quant", "hidden"), CASES)
def test_forward(quant, hidden, activation):
    rng = np.random.default_rng(hidden)
    for neurons in (1, 7, 63, 1023):
        stored, weights = random_ffn(rng, quant, neurons, hidden)
        for tokens in (1, 3):
            x = integer_x(rng, tokens, hidden, low=-3)
            for threads in (1, 2, 5):
                check_ffn(activation, quant, stored, weights, x, threads)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("active_share", [0.0, 0.1, 1.0, "one"])
@pytest.mark.parametrize("activation", ["drelu", "reglu", "relu"])
@pytest.mark.parametrize("quant", QUANTS)
def test_sparsity(quant, activation, active_share, tokens):
    rng = np.random.default_rng(0)
    active = np.arange(1023) == 777 if active_share == "one" else rng.random(1023) < active_share
    stored, weights = random_ffn(rng, quant, 1023, 96, active)
    x = integer_x(rng, tokens, 96, low=1)
    for threads in (1, 2, 5):
        counts = check_ffn(activation, quant, stored, weights, x, threads)
        assert (counts[:, 1:] == active.sum()).all()


@pytest.mark.parametrize("activation", ["drelu", "reglu", "relu"])
def test_tokens_with_different_active_neurons(activation):
    """A neuron that one token needs adds nothing to the others."""
    rng = np.random.default_rng(0)
    stored, weights = random_ffn(rng, "q4", 63, 96, rng.random(63) < 0.1)
    x = integer_x(rng, 3, 96, low=1) * np.float32([[1], [-1], [0]])
    counts = check_ffn(activation, "q4", stored, weights, x)
    assert counts[0, 1] + counts[1, 1] == 63
    assert counts[2].tolist() == [63, 0, 0]


@pytest.mark.parametrize("activation", ["drelu", "reglu"])
def test_exact_mode_reads_no_up_row_behind_a_closed_gate(activation):
    """relu(-inf) * inf is NaN where the up row is read, and 0 where it is not."""
    closed, opened = np.full((1, 32), -1.0), np.full((1, 32), 1.0)
    scales = np.ones((1, 1), np.float16)
    record = ffn_rows(*(encode("f16", w, scales) for w in (closed, opened, opened)))
    neurons = neurons_of(record, 32, "f16", activation)
    x = np.full((1, 32), np.inf, np.float32)
    assert np.isnan(forward(neurons, x, "dense")[0]).all()
    assert (forward(neurons, x, "exact")[0] == 0).all()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_same_threads_same_bits(threads):
    rng = np.random.default_rng(0)
    stored, _ = random_ffn(rng, "q8", 1023, 96)
    neurons = neurons_of(stored, 96, "q8", "drelu")
    x = rng.standard_normal((3, 96), np.float32)
    first, _ = forward(neurons, x, "exact", threads=threads)
    for _ in range(5):
        again, _ = forward(neurons, x, "exact", threads=threads)
        np.testing.assert_array_equal(again, first)


@pytest.mark.parametrize("mode", ["dense", "exact"])
@pytest.mark.parametrize("activation", ["drelu", "reglu", "relu"])
def test_nan_is_not_hidden(activation, mode):
    stored, _ = random_ffn(np.random.default_rng(0), "q4", 7, 32)
    out, _ = forward(
        neurons_of(stored, 32, "q4", activation), np.full((1, 32), np.nan, np.float32), mode
    )
    assert np.isnan(out).all()


@pytest.mark.parametrize("quants", [("q4", "q8", "f16"), ("f16", "q4", "q8"), ("q8", "q4", "q4")])
@pytest.mark.parametrize("activation", ["drelu", "relu", "swiglu"])
def test_gate_up_and_down_may_differ_in_quant(quants, activation):
    rng = np.random.default_rng(0)
    parts = [random_rows(rng, 63, 96) for _ in quants]
    rows = ffn_rows(*(encode(quant, *p) for quant, p in zip(quants, parts, strict=True)))
    weights = [decode(*p) for p in parts]
    x = integer_x(rng, 3, 96, low=-3)
    expected, _ = reference_ffn(activation, *weights, x)
    neurons = _core.Neurons(*rows, 96, list(quants), activation)
    assert_close(forward(neurons, x, "dense", threads=2)[0], expected, "q4")


def test_the_first_neurons_are_a_feed_forward_of_their_own():
    """A hot part elsewhere in memory and the cold rest add up to the whole."""
    rng = np.random.default_rng(0)
    (gates, pairs), _ = random_ffn(rng, "q4", 63, 96)
    x = integer_x(rng, 3, 96, low=-3)
    whole, hot, cold = (
        forward(_core.Neurons(gates[part], pairs[part], 96, ["q4"] * 3, "drelu"), x, "exact")
        for part in (slice(None), slice(20), slice(20, None))
    )
    assert_close(hot[0] + cold[0], whole[0], "q4")
    np.testing.assert_array_equal(hot[1] + cold[1], whole[1])


# -- what goes wrong, and who owns what ----------------------------------------------------------


def matrix_and_arrays():
    return (
        _core.Matrix(np.zeros((7, 32), np.uint8), 32, "q4"),
        np.zeros((3, 32), np.float32),
        np.zeros((3, 7), np.float32),
    )


def empty(neurons):
    return np.zeros((neurons, 32), np.uint8), np.zeros((neurons, 64), np.uint8)


def neurons_and_arrays(activation="drelu"):
    return (
        _core.Neurons(*empty(7), 32, ["q4"] * 3, activation),
        np.zeros((3, 32), np.float32),
        np.zeros((3, 32), np.float32),
        np.zeros((3, 3), np.int32),
    )


def read_only(array):
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("data", "cols", "quant", "error", "message"),
    [
        (np.zeros((7, 128), np.uint8), 32, "q4", ValueError, r"\(7, 128\), expected \(7, 32\)"),
        (np.zeros((7, 18), np.uint8), 32, "q4", ValueError, r"\(7, 18\), expected \(7, 32\)"),
        (np.zeros((7, 64), np.uint8), 33, "q4", ValueError, "33, expected a multiple of 32"),
        (np.zeros((7, 64), np.uint8), 33, "q8", ValueError, "33, expected a multiple of 32"),
        (np.zeros((7, 64), np.uint8), 0, "f16", ValueError, "0, expected at least 1"),
        (np.zeros((7, 64), np.uint8), -32, "q4", ValueError, "-32, expected at least 1"),
        (np.zeros((7, 64), np.uint8), 32, "q5", ValueError, "'q5', expected one of f16, q8, q4"),
        (np.zeros((7, 64), np.int8), 32, "q4", TypeError, "incompatible"),
        (np.zeros((7, 128), np.uint8)[:, ::2], 32, "q4", TypeError, "incompatible"),
        (np.zeros(64, np.uint8), 32, "q4", TypeError, "incompatible"),
    ],
)
def test_matrix_refuses(data, cols, quant, error, message):
    with pytest.raises(error, match=message):
        _core.Matrix(data, cols, quant)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gates": np.zeros((7, 64), np.uint8)}, ValueError, r"gates .*expected \(7, 32\)"),
        ({"pairs": np.zeros((7, 32), np.uint8)}, ValueError, r"pairs .*expected \(7, 64\)"),
        ({"pairs": np.zeros((6, 64), np.uint8)}, ValueError, r"pairs .*expected \(7, 64\)"),
        ({"hidden": 48, "quants": ["q8"] * 3}, ValueError, "hidden is 48"),
        ({"quants": ["q4", "Q4", "q4"]}, ValueError, "quant is 'Q4'"),
        ({"quants": ["q4"]}, ValueError, "quants must be those of gate, up and down"),
        ({"activation": "gelu"}, ValueError, "activation is 'gelu'"),
        ({"threshold": -0.5}, ValueError, "threshold is -0.5"),
        ({"threshold": float("nan")}, ValueError, "threshold is nan"),
        ({"gates": np.zeros((7, 32), np.float32)}, TypeError, "incompatible"),
    ],
)
def test_neurons_refuses(change, error, message):
    gates, pairs = empty(7)
    given = {"gates": gates, "pairs": pairs, "hidden": 32, "quants": ["q4"] * 3}
    with pytest.raises(error, match=message):
        _core.Neurons(**given | {"activation": "drelu"} | change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.zeros((3, 31), np.float32)}, ValueError, r"x has shape \(3, 31\), expected"),
        ({"x": np.zeros((3, 32))}, TypeError, "incompatible"),
        ({"x": np.zeros((3, 64), np.float32)[:, ::2]}, TypeError, "incompatible"),
        ({"x": np.zeros(32, np.float32)}, TypeError, "incompatible"),
        ({"out": np.zeros((7, 3), np.float32)}, ValueError, r"expected \(3, 7\)"),
        ({"out": np.zeros((3, 7))}, TypeError, "incompatible"),
        ({"out": np.zeros((7, 3), np.float32).T}, TypeError, "incompatible"),
        ({"out": read_only(np.zeros((3, 7), np.float32))}, TypeError, "incompatible"),
        ({"threads": 0}, ValueError, "threads is 0, expected 1 to"),
        ({"threads": -1}, ValueError, "threads is -1, expected 1 to"),
    ],
)
def test_matmul_refuses(change, error, message):
    matrix, x, out = matrix_and_arrays()
    with pytest.raises(error, match=message):
        matrix.matmul(**{"x": x, "out": out, "threads": 1} | change)


@pytest.mark.parametrize(
    ("index", "out", "error", "message"),
    [
        (7, np.zeros(32, np.float32), ValueError, "index is 7, expected 0 to 6"),
        (-1, np.zeros(32, np.float32), ValueError, "index is -1, expected 0 to 6"),
        (0, np.zeros(31, np.float32), ValueError, "31 values, expected 32"),
        (0, np.zeros(32), TypeError, "incompatible"),
        (0, np.zeros(64, np.float32)[::2], TypeError, "incompatible"),
    ],
)
def test_row_refuses(index, out, error, message):
    matrix, _, _ = matrix_and_arrays()
    with pytest.raises(error, match=message):
        matrix.row(index, out)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.zeros((3, 64), np.float32)}, ValueError, r"x has shape \(3, 64\), expected"),
        ({"x": np.zeros((3, 32), np.float16)}, TypeError, "incompatible"),
        ({"residual": np.zeros((2, 32), np.float32)}, ValueError, r"residual has shape \(2, 32\)"),
        ({"out": np.zeros((2, 32), np.float32)}, ValueError, r"expected \(3, 32\)"),
        ({"out": np.zeros((3, 64), np.float32)[:, :32]}, TypeError, "incompatible"),
        ({"counts": np.zeros((3, 2), np.int32)}, ValueError, r"expected \(3, 3\)"),
        ({"counts": np.zeros((3, 3), np.int64)}, TypeError, "incompatible"),
        ({"counts": np.zeros((3, 3), np.int32).T}, TypeError, "incompatible"),
        ({"threads": 0}, ValueError, "threads is 0"),
        ({"mode": "sparse"}, ValueError, "'sparse', expected one of dense, exact, predicted"),
        ({"mode": "predicted"}, ValueError, "predicted mode needs a predictor"),
    ],
)
def test_forward_refuses(change, error, message):
    neurons, x, out, counts = neurons_and_arrays()
    arguments = {"x": x, "residual": x, "out": out, "counts": counts, "mode": "exact", "threads": 1}
    with pytest.raises(error, match=message):
        neurons.forward(**arguments | change)


@pytest.mark.parametrize("activation", WITHOUT_ZEROS)
@pytest.mark.parametrize("mode", ["exact", "predicted"])
def test_what_has_no_zeros_has_only_dense_mode(activation, mode):
    neurons, x, *arrays = neurons_and_arrays(activation)
    message = f"'{activation}', which has no exact zeros to skip: use dense mode"
    with pytest.raises(ValueError, match=message):
        neurons.forward(x, x, *arrays, mode=mode, threads=1)


def test_the_array_lives_as_long_as_the_matrix():
    codes, scales = random_rows(np.random.default_rng(0), 7, 96)
    data = encode("q8", codes, scales)
    alive = weakref.ref(data)
    matrix = _core.Matrix(data, 96, "q8")
    del data
    gc.collect()
    assert alive() is not None
    np.testing.assert_array_equal(read_row(matrix, 6), decode(codes, scales)[6])
    del matrix
    gc.collect()
    assert alive() is None


def test_a_read_only_memmap_will_do(tmp_path):
    stored, weights = random_ffn(np.random.default_rng(0), "q4", 63, 96)
    mapped = []
    for number, rows in enumerate(stored):
        rows.tofile(tmp_path / str(number))
        mapped.append(np.memmap(tmp_path / str(number), np.uint8, mode="r").reshape(rows.shape))
    neurons = neurons_of(mapped, 96, "q4", "drelu")
    del mapped
    gc.collect()
    x = np.ones((1, 96), np.float32)
    out, _ = forward(neurons, x, "exact")
    assert_close(out, reference_ffn("drelu", *weights, x)[0], "q4")
