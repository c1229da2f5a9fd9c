"""The truth for every kernel: plain PyTorch on weights dequantised to float32.

Shapes: T tokens, H hidden, I neurons.
"""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from turbosparse.hf.ffn_activation import combined
from turbosparse.quant import dequantise


def sparse_ffn(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, activation: str, *, exact: bool
) -> tuple[Tensor, Tensor]:
    """The feed-forward of T tokens (Turbo Sparse §2).

    Args:
        x: ``[T, H]``.
        gate, up, down: ``[I, H]``, one row per neuron (`down` is the transposed down projection).
        activation: of the FFN record.
        exact: read an up row only where a gate is positive, and a down row only where Combined is
            not zero. Nothing is lost: what is skipped is exactly zero.

    Returns:
        The output ``[T, H]``, and per token the number of neurons with positive gate and with
        Combined ≠ 0, int32 ``[T, 2]``. In the ungated ``relu`` both speak of Combined.
    """
    if exact and activation == "swiglu":
        raise ValueError("swiglu has no exact zeros to skip: use dense mode")
    gated = activation != "relu"
    g = x @ gate.T if gated else x.new_zeros(len(x), len(gate))
    if exact and gated:
        read = (g > 0).any(0).nonzero().squeeze(1)
        g, up, down = g[:, read], up[read], down[read]
    c = combined(g, x @ up.T, activation)
    counts = torch.stack(((g if gated else c).gt(0).sum(1), c.ne(0).sum(1)), 1).int()
    if exact:
        read = (c != 0).any(0).nonzero().squeeze(1)
        c, down = c[:, read], down[read]
    return c @ down, counts


class Matrix:
    """A weight matrix ``[rows, cols]``."""

    def __init__(self, packed: NDArray[Any], cols: int, quant: str, threads: int):  # noqa: ARG002
        self.weight = dequantise(_tensor(packed), quant, cols)

    def matmul(self, x: Tensor) -> Tensor:
        """``[T, cols] → [T, rows]``."""
        return x @ self.weight.T

    def rows(self, indices: list[int]) -> Tensor:
        """Rows as float32 ``[n, cols]``: the embedding look-up."""
        return self.weight[indices]


class Neurons:
    """The records of one feed-forward."""

    def __init__(
        self,
        packed: NDArray[Any],
        hidden: int,
        quant: str,
        activation: str,
        threads: int,  # noqa: ARG002
    ):
        records = _tensor(packed)
        self.gate, self.up, self.down = (
            dequantise(part, quant, hidden) for part in records.chunk(3, dim=1)
        )
        self.activation = activation

    def forward(self, x: Tensor, *, exact: bool) -> tuple[Tensor, Tensor]:
        """See `sparse_ffn`."""
        return sparse_ffn(x, self.gate, self.up, self.down, self.activation, exact=exact)


def _tensor(packed: NDArray[Any]) -> Tensor:
    return torch.from_numpy(packed.copy())  # the map is read-only, which torch cannot express
