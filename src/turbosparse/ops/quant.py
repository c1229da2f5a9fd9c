"""Block formats of packed weights: quantise, and dequantise, which is the truth for every kernel.

``docs/format.md`` says where each byte lies: values, then one fp16 scale for each block of 32, then
zeros up to the stride. The numbers are those of GGUF Q8_0, IQ4_NL (our q4) and Q4_0.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from turbosparse.base.errors import TurboSparseError
from turbosparse.ops.rows import BLOCK, TILE, FFNRows, row_bytes, sign_bytes, value_bytes

F16_MAX = 65504.0
# what a nibble stands for; q4's are closer together near zero, where most weights are
CODES: dict[str, tuple[int, ...]] = {
    "q4": (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
    "q4_0": tuple(range(-8, 8)),
}
# What the largest weight of a block may become in q4. All codes are tried, so that what was in this
# form before comes back as it was, and some numbers beside the outer ones.
_ENDS = (*CODES["q4"], -136, -115, 101, 122)
_Q4_CHUNK = 1 << 16  # weights, whose arrays fit a processor's cache


def quantise(weights: Tensor, quant: str, importance: Tensor | None = None) -> Tensor:
    """Pack a matrix row by row: ``[rows, cols]`` of any float type → uint8 ``[rows, row_bytes]``.

    Args:
        weights: the matrix.
        quant: of `QUANTS`.
        importance: ``[cols]``, mean squares of what the columns are multiplied with. The scales of
            q4 are chosen for the least sum of squared errors, each times its column's importance.

    Raises:
        TurboSparseError: a weight is not finite, or too large for fp16.
    """
    row_bytes(quant, weights.shape[1])  # raises if such rows cannot be packed
    w = checked(weights, quant)
    if quant == "q4":
        return _pack_q4(w, torch.ones(w.shape[1]) if importance is None else importance)
    payload = {"f16": _pack_f16, "q8": _pack_q8, "q4_0": _pack_q4_0}[quant](w)
    return _padded(payload, quant, w.shape[1])


def checked(weights: Tensor, quant: str) -> Tensor:
    """The weights in float32; raises where one does not fit."""
    w = weights.float()
    limit = F16_MAX * {"f16": 1, "q8": 127, "q4": 113, "q4_0": 8}[quant]
    largest = float(w.abs().max()) if w.numel() else 0.0
    if not largest <= limit:  # NaN compares false
        raise TurboSparseError(
            f"a weight of magnitude {largest:g} does not fit {quant} (at most {limit:g})"
        )
    return w


def packed_q4(nibbles: Tensor, scales: Tensor) -> Tensor:
    """Rows of q4: nibbles ``[rows, cols]`` and scales ``[rows, blocks]`` → uint8, as `quantise`."""
    payload = _with_scales(_tiles(nibbles.unflatten(1, (-1, BLOCK))), scales[..., None])
    return _padded(payload, "q4", nibbles.shape[1])


def _padded(payload: Tensor, quant: str, cols: int) -> Tensor:
    return torch.nn.functional.pad(payload, (0, row_bytes(quant, cols) - payload.shape[1]))


def dequantise(packed: Tensor, quant: str, cols: int) -> Tensor:
    """Unpack rows: uint8 ``[rows, row_bytes]`` → float32 ``[rows, cols]``."""
    if quant == "f16":
        return packed[:, : 2 * cols].contiguous().view(torch.float16).float()
    blocks, values = cols // BLOCK, value_bytes(quant, cols)
    scales = packed[:, values : values + 2 * blocks].contiguous().view(torch.float16).float()
    payload = packed[:, :values].contiguous()
    if quant == "q8":
        q = payload.view(torch.int8)
    else:
        q = torch.tensor(CODES[quant], dtype=torch.int8)[_nibbles(payload, blocks).int()]
    return (q.reshape(-1, blocks, BLOCK) * scales[..., None]).reshape(-1, cols)


def sign_bits(weights: Tensor) -> Tensor:
    """Which weights are negative: ``[rows, cols]`` → uint8 ``[rows, sign_bytes(cols)]``.

    Bit b, counted from the lowest, of byte i is column ``8 · i + b``; zeros fill up the row.
    """
    negative = (weights < 0).cpu().numpy()
    bits = torch.from_numpy(np.packbits(negative, axis=1, bitorder="little"))
    return torch.nn.functional.pad(bits, (0, sign_bytes(weights.shape[1]) - bits.shape[1]))


def negative(bits: Tensor, cols: int) -> Tensor:
    """Unpack `sign_bits`: uint8 ``[rows, sign_bytes(cols)]`` → bool ``[rows, cols]``."""
    bit = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[..., None] >> bit) & 1).flatten(1)[:, :cols].bool()


def quantise_ffn(weights: Iterable[Tensor], quants: tuple[str, ...]) -> FFNRows:
    """Pack the parts of a feed-forward, one row ``[hidden]`` of each for each neuron."""
    parts = list(zip(weights, quants, strict=True))
    packed = [quantise(part, quant).numpy() for part, quant in parts]
    return FFNRows.join(packed, parts[0][0].shape[1], quants)


def dequantise_ffn(rows: FFNRows) -> tuple[Tensor, ...]:
    """The parts (gate, up and down, or up and down), float32 ``[I, hidden]``."""
    parts = zip(rows.split(), rows.quants, strict=True)
    return tuple(dequantise(torch.tensor(part), quant, rows.hidden) for part, quant in parts)


def signs(rows: FFNRows, parts: int) -> NDArray[np.uint8]:
    """Which weights of the first parts' rows are negative: packed bits."""
    return torch.cat([sign_bits(part) for part in dequantise_ffn(rows)[:parts]], 1).numpy()


def sqnr(reference: Tensor, approximation: Tensor) -> float:
    """Signal to quantisation noise ratio in dB."""
    noise = (reference - approximation).double().square().sum()
    return float(10 * torch.log10(reference.double().square().sum() / noise))


def _pack_f16(w: Tensor) -> Tensor:
    return w.half().view(torch.uint8)


def _pack_q8(w: Tensor) -> Tensor:
    blocks = w.unflatten(1, (-1, BLOCK))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    x = blocks * inverse(scale)
    q = torch.copysign((x.abs() + 0.5).floor(), x)  # halves away from zero, as C's roundf
    return _with_scales(q.to(torch.int8).flatten(1).view(torch.uint8), scale)


def _pack_q4_0(w: Tensor) -> Tensor:
    blocks = w.unflatten(1, (-1, BLOCK))
    scale = _extremes(blocks) / -8
    q = (blocks.double() * inverse(scale).double() + 8.5).trunc().clamp(0, 15).to(torch.uint8)
    return _with_scales(_tiles(q), scale)


def _pack_q4(w: Tensor, importance: Tensor) -> Tensor:
    column = shares(importance).unflatten(0, (-1, BLOCK))
    parts = []
    for part in w.split(max(1, _Q4_CHUNK // w.shape[1])):
        blocks = part.unflatten(1, (-1, BLOCK))
        scale = best_scales(blocks, column)
        nibble = nibbles(blocks * inverse(scale)).flatten(1)
        parts.append(packed_q4(nibble, scale[..., 0]))
    return torch.cat(parts)


def shares(importance: Tensor) -> Tensor:
    """Of the largest; what is less than a millionth counts as that."""
    largest = importance.max().clamp(min=torch.finfo(torch.float32).tiny)
    return (importance.float() / largest).clamp(min=1e-6)


def best_scales(blocks: Tensor, importance: Tensor) -> Tensor:
    """The q4 scales ``[rows, blocks, 1]`` of the least weighted error that was found.

    For each of `_ENDS` the largest weight becomes that number, and the least squares of the codes
    that follow give the scale.

    Args:
        blocks: weights ``[rows, blocks, 32]``.
        importance: of their columns, ``[blocks, 32]``.
    """
    extreme = _extremes(blocks)
    best, least = torch.zeros_like(extreme), torch.full_like(extreme, torch.inf)
    for end in _ENDS:
        code = codes(blocks * inverse((extreme / end).half().float()))
        fitted = (importance * blocks * code).sum(-1, keepdim=True)
        scale = (fitted / (importance * code * code).sum(-1, keepdim=True)).half().float()
        off = codes(blocks * inverse(scale)) * scale - blocks
        error = (importance * off.square_()).sum(-1, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def nibbles(x: Tensor) -> Tensor:
    """Of the q4 codes that are nearest to `x`, uint8."""
    at = (x * 2 + 256).clamp_(0, 511).int()
    return _nearest()[0].index_select(0, at.flatten()).view(at.shape)


def codes(x: Tensor) -> Tensor:
    """The q4 codes that are nearest to `x`, float32."""
    at = (x * 2 + 256).clamp_(0, 511).int()
    return _nearest()[1].index_select(0, at.flatten()).view(at.shape)


@cache
def _nearest() -> tuple[Tensor, Tensor]:
    """Nibbles and codes nearest to numbers that grow by halves, as the borders between codes do."""
    code = torch.tensor(CODES["q4"], dtype=torch.float32)
    halves = torch.arange(-256, 256) / 2 + 0.25
    nibble = torch.bucketize(halves, (code[1:] + code[:-1]) / 2)
    return nibble.to(torch.uint8), code[nibble]


def _extremes(blocks: Tensor) -> Tensor:
    """The weight of largest magnitude of each block, ``[rows, blocks, 1]``."""
    return blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))


def _tiles(q: Tensor) -> Tensor:
    """Nibbles ``[rows, blocks, 32]`` → bytes ``[rows, blocks · 16]``, as they lie in a row."""
    low, high = q.unflatten(-1, (2, 16)).unbind(-2)
    block_bytes = low | (high << 4)  # [rows, blocks, 16]
    tiles = [t.unflatten(-1, (4, 4)).transpose(1, 2).flatten(1) for t in block_bytes.split(TILE, 1)]
    return torch.cat(tiles, 1)


def _nibbles(payload: Tensor, blocks: int) -> Tensor:
    """The inverse of `_tiles`."""
    rows = len(payload)
    tiles = [
        tile.reshape(rows, 4, -1, 4).transpose(1, 2).flatten(2)
        for tile in payload.reshape(rows, blocks * 16).split(TILE * 16, 1)
    ]
    block_bytes = torch.cat(tiles, 1)
    return torch.cat((block_bytes & 15, block_bytes >> 4), -1)


def inverse(scale: Tensor) -> Tensor:
    """1 ÷ scale; 0 of a zero."""
    return torch.where(scale == 0, 0.0, 1 / scale)


def _with_scales(values: Tensor, scale: Tensor) -> Tensor:
    return torch.cat((values, scale.squeeze(-1).half().view(torch.uint8)), 1)
