"""Block formats against the independent `gguf` package, and their losses and limits."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turbosparse.base.errors import TurboSparseError
from turbosparse.ops.quant import CODES, dequantise, negative, quantise, sign_bits, sqnr
from turbosparse.ops.rows import BLOCK, CACHE_LINE, QUANTS, ROW_STEP, TILE, row_bytes

GGUF = {
    "f16": gguf.GGMLQuantizationType.F16,
    "q8": gguf.GGMLQuantizationType.Q8_0,
    "q4": gguf.GGMLQuantizationType.IQ4_NL,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
}
# around the q4 tile of 512 weights and the cache line of 64 bytes
WIDTHS = (32, 96, 512, 544, 1056)
ODD_WIDTHS = (1, 7, 172)
# least signal to quantisation noise ratio on normal weights, dB
MIN_SQNR = {"f16": 70, "q8": 40, "q4": 20.5, "q4_0": 18}


def oracle(w: torch.Tensor, quant: str) -> torch.Tensor:
    """What llama.cpp's own Python package makes of the weights."""
    packed = gguf.quants.quantize(w.numpy(), GGUF[quant])
    return torch.from_numpy(gguf.quants.dequantize(packed, GGUF[quant])).float()


def round_trip(w: torch.Tensor, quant: str) -> torch.Tensor:
    return dequantise(quantise(w, quant), quant, w.shape[1])


def normal(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


CASES = [(quant, cols) for quant in QUANTS for cols in WIDTHS] + [("f16", c) for c in ODD_WIDTHS]


@pytest.mark.parametrize(("quant", "cols"), [case for case in CASES if case[0] != "q4"])
def test_numbers_are_those_of_gguf_bit_for_bit(quant: str, cols: int) -> None:
    scales = 10.0 ** torch.arange(-9.0, 4.0)[:, None]  # fp16 subnormals and zero scales too
    w = torch.cat((normal(64, cols), normal(13, cols, seed=1) * scales))
    assert torch.equal(round_trip(w, quant), oracle(w, quant))


@pytest.mark.parametrize("cols", WIDTHS)
def test_q4_gives_back_the_numbers_of_a_gguf_file_bit_for_bit(cols: int) -> None:
    random = np.random.default_rng(cols)
    blocks = random.integers(0, 256, (600, cols // BLOCK, 18), np.uint8)
    blocks[:16, :, 2:] = (17 * np.arange(16, dtype=np.uint8))[:, None, None]  # one code only
    scales = random.standard_normal(blocks.shape[:2]) * 10.0 ** random.integers(-9, 5, (600, 1))
    blocks[..., :2] = scales.clip(-6e4, 6e4).astype("<f2")[..., None].view(np.uint8)
    w = gguf.quants.dequantize(blocks.reshape(600, -1), GGUF["q4"])
    assert torch.equal(round_trip(torch.from_numpy(w), "q4"), torch.from_numpy(w))


def test_importance_moves_the_error_to_the_columns_that_matter_least() -> None:
    w, importance = normal(64, 512), normal(512, 1, seed=1).squeeze().mul(2).exp()
    losses = [
        float(((dequantise(quantise(w, "q4", given), "q4", 512) - w) ** 2 @ importance).sum())
        for given in (importance, 7 * importance, None)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0] < 0.8 * losses[2]


@pytest.mark.parametrize("quant", ["q8", "q4_0"])
def test_values_halfway_between_two_steps_round_as_gguf_does(quant: str) -> None:
    top = 127.0 if quant == "q8" else -8.0  # so that the scale is 1
    halves = torch.arange(-7.5, 7.5, 0.5)
    w = torch.cat((torch.tensor([top]), halves, torch.tensor([0.0])))[None]
    assert w.shape == (1, 32)
    assert torch.equal(round_trip(w, quant), oracle(w, quant))


def by_the_format(quant: str, codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Rows as docs/format.md has them, of codes [rows, cols] and scales [rows, cols / 32]."""
    cols = codes.shape[1]
    nibbles = np.searchsorted(CODES[quant], codes) if quant in CODES else codes
    if quant == "f16":
        values = (np.repeat(scales, BLOCK, 1)[:, :cols] * codes).astype(np.float16)
    elif quant == "q8":
        values = codes.astype(np.int8)
    else:
        values = np.zeros((len(codes), cols // 2), np.uint8)
        for column in range(cols):
            block, j = divmod(column, BLOCK)
            tile, g = divmod(block, TILE)
            blocks = min(TILE, cols // BLOCK - TILE * tile)  # of this tile
            r, b = divmod(j % 16, 4)
            place = 256 * tile + 4 * blocks * r + 4 * g + b
            values[:, place] |= (nibbles[:, column] << 4 * (j // 16)).astype(np.uint8)
    parts = [values] if quant == "f16" else [values, scales]
    payload = np.concatenate([part.view(np.uint8) for part in parts], 1)
    step = CACHE_LINE if quant == "f16" else ROW_STEP
    return np.pad(payload, ((0, 0), (0, -payload.shape[1] % step)))


@pytest.mark.parametrize(("quant", "cols"), CASES)
def test_bytes_lie_where_the_format_says(quant: str, cols: int) -> None:
    random = np.random.default_rng(cols)
    known = np.array(CODES.get(quant, range(-127, 128)))
    codes = random.choice(known, (7, cols))
    codes[:, ::BLOCK] = known[0]  # so that quantise finds these scales
    scales = (2.0 ** random.integers(-9, -5, (7, -(-cols // BLOCK)))).astype(np.float16)
    rows = torch.from_numpy(by_the_format(quant, codes, scales))
    weights = np.repeat(scales.astype(np.float32), BLOCK, 1)[:, :cols] * codes
    assert torch.equal(dequantise(rows, quant, cols), torch.from_numpy(weights).float())
    assert torch.equal(quantise(torch.from_numpy(weights), quant), rows)
    assert rows.shape[1] == row_bytes(quant, cols)


@pytest.mark.parametrize("cols", [1, 7, 64, 172, 512, 544])
def test_sign_bits_unpack_to_the_signs(cols: int) -> None:
    weights = normal(5, cols)
    bits = sign_bits(weights)
    assert bits.shape == (5, -(-cols // 512) * 64)
    assert torch.equal(negative(bits, cols), weights < 0)
    column = cols // 2
    assert bool(bits[3, column // 8] >> column % 8 & 1) == bool(weights[3, column] < 0)


@pytest.mark.parametrize("quant", QUANTS)
def test_zero_blocks_stay_exactly_zero(quant: str) -> None:
    w = normal(4, 96)
    w[1] = 0
    w[2, 32:64] = 0
    assert not round_trip(w, quant)[1].any()
    assert not round_trip(w, quant)[2, 32:64].any()


@pytest.mark.parametrize("quant", QUANTS)
def test_loss_on_normal_weights_is_bounded(quant: str) -> None:
    w = normal(64, 1056) * 0.02
    assert sqnr(w, round_trip(w, quant)) >= MIN_SQNR[quant]


def test_f16_is_exact_for_bf16_sources_in_its_range() -> None:
    exponents = 2.0 ** torch.arange(-14, 15)[:, None]
    w = (normal(29, 172).sign() * (1 + torch.rand(29, 172)) * exponents).bfloat16()
    assert torch.equal(round_trip(w, "f16"), w.float())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e9])
@pytest.mark.parametrize("quant", QUANTS)
def test_weights_that_do_not_fit_are_refused(quant: str, bad: float) -> None:
    w = normal(2, 64)
    w[1, 40] = bad
    with pytest.raises(TurboSparseError, match=f"magnitude .* does not fit {quant}"):
        quantise(w, quant)


@pytest.mark.parametrize(
    ("quant", "largest"), [("f16", 65504.0), ("q8", 8.3e6), ("q4", 7.4e6), ("q4_0", 5.2e5)]
)
def test_the_largest_weights_stay_finite(quant: str, largest: float) -> None:
    w = torch.full((1, 32), -largest)
    assert torch.allclose(round_trip(w, quant), w, rtol=0.01)


@pytest.mark.parametrize("quant", ["q8", "q4", "q4_0"])
@pytest.mark.parametrize("cols", [1, 31, 172])
def test_widths_off_the_block_are_sent_to_f16(quant: str, cols: int) -> None:
    with pytest.raises(TurboSparseError, match=f"multiple of 32 weights, not {cols}; use f16"):
        quantise(normal(1, cols), quant)


def test_unknown_format_lists_the_known_ones() -> None:
    with pytest.raises(TurboSparseError, match="'q5' is unknown; use f16, q8, q4, q4_0"):
        row_bytes("q5", 32)


@settings(max_examples=60, deadline=None)
@given(
    quant=st.sampled_from(QUANTS),
    blocks=st.integers(1, 18),
    seed=st.integers(0, 2**32 - 1),
    exponent=st.integers(-8, 4),
    kept=st.floats(0, 1),
)
def test_packing_what_was_packed_changes_nothing(
    quant: str, blocks: int, seed: int, exponent: int, kept: float
) -> None:
    random = np.random.default_rng(seed)
    w = random.standard_normal((3, 32 * blocks)) * 10.0**exponent
    w *= random.random(w.shape) < kept
    once = round_trip(torch.from_numpy(w), quant)
    assert torch.equal(round_trip(once, quant), once)
