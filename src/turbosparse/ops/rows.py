"""How many bytes a packed row takes, by format. Loads no torch; `quant` fills the rows."""

from __future__ import annotations

from turbosparse.base.errors import TurboSparseError

QUANTS = ("f16", "q8", "q4")
BLOCK = 32
TILE = 16  # blocks
ALIGNMENT = 64  # bytes: a cache line


def row_bytes(quant: str, cols: int) -> int:
    """Stride of a row of `cols` weights, in bytes.

    Raises:
        TurboSparseError: unknown format, or `cols` is no multiple of the block.
    """
    if quant not in QUANTS:
        raise TurboSparseError(f"quant {quant!r} is unknown; use {', '.join(QUANTS)}")
    if quant != "f16" and cols % BLOCK:
        raise TurboSparseError(
            f"{quant} needs rows of a multiple of {BLOCK} weights, not {cols}; use f16"
        )
    scales = 2 * cols // BLOCK
    payload = {"f16": 2 * cols, "q8": cols + scales, "q4": cols // 2 + scales}[quant]
    return -(-payload // ALIGNMENT) * ALIGNMENT


def sign_bytes(cols: int) -> int:
    """Stride of the sign bits of a row of `cols` weights, in bytes."""
    return -(-cols // (8 * ALIGNMENT)) * ALIGNMENT
