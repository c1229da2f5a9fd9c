"""The C++ core behind the interface of `reference`: weights stay packed, in the mapped file."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from turbosparse import _core
from turbosparse.ops import Mode
from turbosparse.ops.native import neurons
from turbosparse.ops.predictor import PackedPredictor
from turbosparse.ops.rows import FFNRows


class Matrix:
    """A weight matrix ``[rows, cols]``."""

    def __init__(self, packed: NDArray[Any], cols: int, quant: str, threads: int):
        self._matrix = _core.Matrix(packed, cols, quant)
        self._threads = threads

    def matmul(self, x: Tensor) -> Tensor:
        """``[T, cols] → [T, rows]``."""
        out = np.empty((len(x), self._matrix.rows), np.float32)
        self._matrix.matmul(x.contiguous().numpy(), out, self._threads)
        return torch.from_numpy(out)

    def rows(self, indices: list[int]) -> Tensor:
        """Rows as float32 ``[n, cols]``: the embedding look-up."""
        out = np.empty((len(indices), self._matrix.cols), np.float32)
        for row, index in zip(out, indices, strict=True):
            self._matrix.row(index, row)
        return torch.from_numpy(out)


class Neurons:
    """The rows of one feed-forward, and its predictor, if it has one."""

    def __init__(
        self,
        rows: FFNRows,
        activation: str,
        threads: int,
        predictor: PackedPredictor | None = None,
        threshold: float = 0.0,
    ):
        self._neurons = neurons(rows, activation, predictor, threshold)
        self._threads = threads

    def forward(self, x: Tensor, residual: Tensor, *, mode: Mode) -> tuple[Tensor, Tensor]:
        """See `reference.Neurons.forward`."""
        out = np.empty(x.shape, np.float32)
        counts = np.empty((len(x), 3), np.int32)
        self._neurons.forward(
            x.contiguous().numpy(),
            residual.contiguous().numpy(),
            out,
            counts,
            mode,
            self._threads,
        )
        return torch.from_numpy(out), torch.from_numpy(counts)
