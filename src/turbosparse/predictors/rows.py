"""What one feed-forward reads of a text, and which of its neurons matter there.

Shapes: N tokens that reach it, H hidden, I neurons.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear

from turbosparse.hf.activations import ACTIVATIONS
from turbosparse.hf.ffn_activation import combined
from turbosparse.hf.layerwise import Layerwise
from turbosparse.hf.load import activation_of, threshold_of
from turbosparse.hf.surgery import FFN, weights_of

ROWS = 2048  # tokens at a time


@dataclass(frozen=True)
class Feed:
    """A feed-forward and its tokens.

    `residual` is ``[all tokens, H]``, before the norm, `at` the rows of it that this one reads, and
    `reads` what a predictor of it reads: post_norm, the same, or pre_norm, the residual.
    """

    model: Layerwise
    shell: Any
    ffn: FFN
    residual: Tensor
    at: Tensor
    reads: str

    def __len__(self) -> int:
        return len(self.at)

    def rows(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """What it and a predictor of it read of these of its tokens, float32 ``[n, H]`` both."""
        residual = self.residual[self.at[chosen]].to(self.model.device)
        x = self.model.ffn_input(self.shell, residual).float()
        return x, residual.float() if self.reads == "pre_norm" else x

    def batches(self, most: int | None = None) -> Iterator[Tensor]:
        """The numbers of its first `most` tokens, some at a time."""
        return iter(torch.arange(len(self))[:most].split(ROWS))

    def active(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Which gates are positive, bool, and Combined; without a gate, up stands for it."""
        config, x = self.model.config, x.to(self.ffn.up.dtype)
        gate, up = linear(x, self.ffn.gate).float(), linear(x, self.ffn.up).float()
        threshold = threshold_of(config)
        return gate > threshold, combined(gate, up, activation_of(config), threshold)

    def shares(self, active: Tensor) -> Tensor:
        """See `shares_of`."""
        return shares_of(active, self.ffn.down)

    def labels(self, carry: float) -> Labels:
        """The neurons to predict: the fewest that carry this share of a token's output; 1: all."""
        bits, count = [], 0
        for rows in self.batches():
            x, _ = self.rows(rows)
            wanted = carrying(self.shares(self.active(x)[1]), carry)
            count += int(wanted.sum())
            bits.append(np.packbits(wanted.cpu().numpy(), axis=-1))
        neurons = len(self.ffn.up)
        return Labels(np.concatenate(bits), neurons, count / (max(1, len(self)) * neurons))

    def decides(self) -> list[Tensor]:
        """The matrices that decide whether a neuron is active, float32 ``[I, H]``."""
        parts = self.ffn._asdict()
        zero_by = ACTIVATIONS[activation_of(self.model.config)].zero_by
        return [parts[part].float() for part in zero_by]

    def only(self, chosen: Tensor) -> Feed:
        """With those of its tokens that `chosen` says of all, bool ``[all tokens]``."""
        return replace(self, at=self.at[chosen[self.at]])


class Labels(NamedTuple):
    """One bit for each token and neuron; `share` are set."""

    bits: NDArray[np.uint8]
    neurons: int
    share: float

    def of(self, rows: Tensor) -> Tensor:
        """Bool ``[n, I]``."""
        return torch.from_numpy(
            np.unpackbits(self.bits[rows.numpy()], axis=-1, count=self.neurons).astype(bool)
        )


def shares_of(active: Tensor, down: Tensor) -> Tensor:
    """Of each neuron in what a token's neurons add to the output: squares, summing up to 1.

    Args:
        active: Combined, ``[N, I]``.
        down: ``[H, I]``.
    """
    added: Tensor = (active * down.float().norm(dim=0)).square()
    return added / added.sum(-1, keepdim=True).clamp(min=1e-30)


def carrying(shares: Tensor, carry: float) -> Tensor:
    """The fewest largest of each row that sum up to `carry`, bool."""
    if carry >= 1:
        return shares > 0
    ordered, places = shares.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    return torch.zeros_like(shares, dtype=torch.bool).scatter(
        -1, places, (before < carry) & (ordered > 0)
    )


def feeds(model: Layerwise, shell: Any, residual: Tensor, reads: str) -> list[Feed]:
    """The feed-forwards of a layer, each with its tokens of a residual ``[sequences, T, H]``."""
    every = torch.arange(residual.shape[0] * residual.shape[1])
    flat, mlp = residual.flatten(0, 1), shell.layers[0].mlp
    if not hasattr(mlp, "experts"):
        return [Feed(model, shell, weights_of(mlp)[0], flat, every, reads)]
    chosen = model.routed(shell, residual).flatten(0, 1)
    return [
        Feed(model, shell, ffn, flat, every[(chosen == number).any(-1)], reads)
        for number, ffn in enumerate(weights_of(mlp))
    ]
