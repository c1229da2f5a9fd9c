"""The kernel seam: one module per backend, each with a `Matrix` and a `Neurons` of one interface.

``torch`` is `reference`, pure PyTorch on dequantised weights: the truth. ``cpu`` is the C++ core,
``gpu`` Triton kernels.
"""

from __future__ import annotations

from types import ModuleType
from typing import Literal

from turbosparse.base.errors import TurboSparseError

BACKENDS = ("torch", "cpu", "gpu")
# which rows of a feed-forward are read; see `reference.sparse_ffn`
Mode = Literal["dense", "exact", "predicted"]


def backend(name: str) -> ModuleType:
    """The kernels of a backend."""
    if name == "torch":
        from turbosparse.ops import reference

        return reference
    if name == "cpu":
        from turbosparse.ops import cpu

        return cpu
    if name == "gpu":
        from turbosparse.ops import gpu

        return gpu
    raise TurboSparseError(f"backend {name!r} is unknown; use {', '.join(BACKENDS)}")
