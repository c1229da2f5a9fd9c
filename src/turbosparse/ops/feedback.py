"""Rounding with feedback: what rounding the weights of one input loses, later ones make up for.

The method of GPTQ (arXiv:2210.17323, §3): the inputs of a matrix are rounded one after the other,
and the error of each is spread over those that are not rounded yet, by how they correlate. Here the
inputs with the largest values come first, and the scale of a block is searched when its turn comes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from turbosparse.ops.quant import best_scales, checked, codes, inverse, nibbles, packed_q4, shares
from turbosparse.ops.rows import BLOCK

_RIDGE = (
    0.01  # added to each input's mean square, in means of all: inputs that are small stay alone
)
_PRECISE = 1e-4  # of a diagonal of one: what float32 can factorise


class Feedback:
    """The order of a matrix's inputs, and how errors are passed on among them.

    Args:
        moments: mean products of the inputs with one another, ``[inputs, inputs]``.
        together: so many neighbours keep their places beside one another.
    """

    def __init__(self, moments: Tensor, together: int = 1):
        squares = moments.diagonal() + (_RIDGE * moments.diagonal().mean()).clamp(min=1e-30)
        groups = squares.unflatten(0, (-1, together)).sum(-1).argsort(descending=True, stable=True)
        self.order = (groups[:, None] * together + torch.arange(together)).flatten()
        # M⁻¹ = UᵀU with U upper: a row of U says how an error spreads. From the last input to the
        # first M = L·Lᵀ with L lower, and L⁻¹ is U from last to first. A diagonal of one in M, by
        # scaling, makes float32 precise enough.
        back = self.order.flip(0)
        size = squares[back].rsqrt()
        scaled = moments[back][:, back].mul_(size).mul_(size[:, None])
        scaled.diagonal().fill_(1 + _PRECISE)
        lower = torch.linalg.cholesky(scaled, out=scaled)
        unit = torch.eye(len(lower))
        spread = torch.linalg.solve_triangular(lower, unit, upper=False, out=unit).mul_(size)
        self.spread = spread.flip(0, 1)
        self.importance = shares(self.spread.diagonal() ** -2)

    def columns(self, weights: Tensor) -> Tensor:
        """Pack rows that meet an input in each column: ``[rows, inputs]`` → uint8 as `quantise`.

        The blocks of a row must be kept: made with ``together=BLOCK``.
        """

        def scales(part: Tensor, importance: Tensor) -> Tensor:
            return best_scales(part.T[:, None], importance[None])[:, 0].T

        nibble, scale = self._rounded(checked(weights, "q4").T, scales)
        return packed_q4(nibble.T, scale.T[:, ::BLOCK].contiguous())

    def rows(self, weights: Tensor) -> Tensor:
        """Pack rows that meet one input each: ``[inputs, cols]`` → uint8 as `quantise`."""

        def scales(part: Tensor, _: Tensor) -> Tensor:
            blocks = part.unflatten(1, (-1, BLOCK))
            return best_scales(blocks, torch.ones(BLOCK)).expand_as(blocks).flatten(1)

        nibble, scale = self._rounded(checked(weights, "q4"), scales)
        return packed_q4(nibble, scale[:, ::BLOCK])

    def _rounded(
        self, weights: Tensor, scales: Callable[[Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The nibble and the scale of each weight, ``[inputs, outputs]`` like the weights."""
        w = weights[self.order]
        nibble, scale = torch.empty(w.shape, dtype=torch.uint8), torch.empty_like(w)
        for at in range(0, len(w), BLOCK):
            block = slice(at, min(at + BLOCK, len(w)))
            after = slice(block.stop, None)
            scale[block] = scales(w[block], self.importance[block])
            error = torch.empty_like(w[block])
            for i in range(at, block.stop):
                x = w[i] * inverse(scale[i])
                nibble[i] = nibbles(x)
                error[i - at] = (w[i] - codes(x) * scale[i]) / self.spread[i, i]
                rest = slice(i + 1, block.stop)
                w[rest].addr_(self.spread[i, rest], error[i - at], alpha=-1)
            w[after].addmm_(self.spread[block, after].T, error, alpha=-1)
        places = self.order.argsort()
        return nibble[places], scale[places]
