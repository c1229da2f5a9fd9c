"""Where packed rows lie, by format. Loads no torch; `quant` fills the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from turbosparse.base.errors import TurboSparseError

Quant = Literal["f16", "q8", "q4", "q4_0"]
QUANTS: tuple[Quant, ...] = get_args(Quant)
_BITS = {"f16": 16, "q8": 8, "q4": 4, "q4_0": 4}  # of a value
BLOCK = 32
TILE = 16  # blocks
CACHE_LINE = 64  # bytes
ROW_STEP = 16  # bytes; of f16 a cache line: see docs/format.md
BUNDLE_STEP = 512  # bytes; what most disks read at least


def row_bytes(quant: str, cols: int) -> int:
    """Stride of a row of `cols` weights, in bytes.

    Raises:
        TurboSparseError: unknown format, or `cols` is not a multiple of the block.
    """
    if quant not in QUANTS:
        raise TurboSparseError(f"quant {quant!r} is unknown; use {', '.join(QUANTS)}")
    if quant != "f16" and cols % BLOCK:
        raise TurboSparseError(
            f"{quant} needs rows of a multiple of {BLOCK} weights, not {cols}; use f16"
        )
    scales, step = (0, CACHE_LINE) if quant == "f16" else (2 * cols // BLOCK, ROW_STEP)
    return -(-(value_bytes(quant, cols) + scales) // step) * step


def bundle_bytes(hidden: int, quants: Sequence[str]) -> int:
    """Stride of the bundles of a feed-forward with parts in these formats, in bytes."""
    rows = sum(row_bytes(quant, hidden) for quant in quants)
    return -(-rows // BUNDLE_STEP) * BUNDLE_STEP


def value_bytes(quant: str, cols: int) -> int:
    """Bytes of a row's values, which the scales follow."""
    return cols * _BITS[quant] // 8


def sign_bytes(cols: int) -> int:
    """Stride of the sign bits of a row of `cols` weights, in bytes."""
    return -(-cols // (8 * CACHE_LINE)) * CACHE_LINE


@dataclass(frozen=True)
class FFNRows:
    """The packed rows of one feed-forward of I neurons; any first ones are a feed-forward too.

    All gate rows are read as one stream; a neuron's up row and down column are read together or
    not at all. In an ungated feed-forward up is its own gate: the up rows are `gates`, and the down
    columns alone are `pairs`.

    In `bundles` a neuron's gate row and pair follow each other: one read from disk. Gates and pairs
    are then views of these.
    """

    gates: NDArray[Any]  # uint8 [I, row_bytes]
    pairs: NDArray[Any]  # uint8 [I, row_bytes of each of the other parts]
    hidden: int
    quants: tuple[str, ...]  # of the parts: gate, up and down, or up and down
    bundles: NDArray[Any] | None = None  # uint8 [I, bundle_bytes]

    @classmethod
    def join(cls, parts: Sequence[NDArray[Any]], hidden: int, quants: tuple[str, ...]) -> Self:
        """From the packed rows of the parts."""
        return cls(np.ascontiguousarray(parts[0]), np.concatenate(parts[1:], 1), hidden, quants)

    @classmethod
    def of_bundles(cls, bundles: NDArray[Any], hidden: int, quants: tuple[str, ...]) -> Self:
        gate, *pair = (row_bytes(quant, hidden) for quant in quants)
        gates, pairs = bundles[:, :gate], bundles[:, gate : gate + sum(pair)]
        return cls(gates, pairs, hidden, quants, bundles)

    def split(self) -> list[NDArray[Any]]:
        """The packed rows of the parts."""
        widths = [row_bytes(quant, self.hidden) for quant in self.quants[1:]]
        return [self.gates, *np.split(self.pairs, np.cumsum(widths)[:-1], axis=1)]

    def __getitem__(self, neurons: Any) -> Any:
        if self.bundles is not None:
            return self.of_bundles(self.bundles[neurons], self.hidden, self.quants)
        return type(self)(self.gates[neurons], self.pairs[neurons], self.hidden, self.quants)


def finite_scales(rows: NDArray[Any], quant: str, cols: int) -> bool:
    """Whether every weight of packed rows is finite: only halves can be anything else."""
    start = 0 if quant == "f16" else value_bytes(quant, cols)
    halves = rows[:, start : start + 2 * (cols if quant == "f16" else cols // BLOCK)]
    step = max(1, (1 << 22) // max(1, halves.shape[1]))
    return all(
        np.isfinite(np.ascontiguousarray(halves[at : at + step]).view("<f2")).all()
        for at in range(0, len(rows), step)
    )
