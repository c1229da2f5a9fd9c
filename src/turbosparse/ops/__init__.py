"""The kernel seam: one module per road, each with a `Matrix` and a `Neurons` of the same interface.

``torch`` is `reference`, pure PyTorch on dequantised weights: the truth. ``cpu`` is the C++ core.
"""

from __future__ import annotations

from types import ModuleType
from typing import Literal

from turbosparse.base.errors import TurboSparseError

ROADS = ("torch", "cpu")
# which rows of a feed-forward are read; see `reference.sparse_ffn`
Mode = Literal["dense", "exact", "predicted"]


def road(name: str) -> ModuleType:
    """The kernels of a road."""
    if name == "torch":
        from turbosparse.ops import reference

        return reference
    if name == "cpu":
        from turbosparse.ops import cpu

        return cpu
    raise TurboSparseError(f"road {name!r} is unknown; use {', '.join(ROADS)}")
