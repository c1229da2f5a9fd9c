"""More zeros than the data asks for: Combined is pressed towards zero, more and more (ProSparse).

Off unless a recipe has `l1`; `SparseTrainer` adds it to the loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from turbosparse.hf.observe import change_combined


def ramp(step: int, warmup_steps: int) -> float:
    """From 0 to 1 in `warmup_steps`, along half a cosine wave; step 0 is the first."""
    if step >= warmup_steps:
        return 1.0
    return (1 - math.cos(math.pi * step / warmup_steps)) / 2


class L1Penalty:
    """`weight` × mean |Combined| over all its entries, and the sum of it for the log."""

    def __init__(self, weight: float, warmup_steps: int):
        self.weight, self.warmup_steps = weight, warmup_steps
        self._sum: Any = 0.0  # a tensor: a number would wait for the device
        self._steps: set[int] = set()

    @contextmanager
    def watch(self, model: Any) -> Iterator[list[tuple[Tensor, int]]]:
        """Gather the ‖Combined‖₁ of each FFN and its number of entries in the passes inside."""
        norms: list[tuple[Tensor, int]] = []

        def gather(combined: Tensor) -> Tensor:
            if combined.requires_grad:  # else the sparsity meter is looking
                norms.append((combined.abs().sum(dtype=torch.float32), combined.numel()))
            return combined

        with change_combined(model, gather):
            yield norms

    def of(
        self, norms: list[tuple[Tensor, int]], labels: Tensor, *, step: int, items: Any
    ) -> Tensor:
        """What a micro-batch adds to the loss, as its share of the batch's mean.

        Args:
            norms: what `watch` gave.
            labels: ``[B, T]``; a position predicts the next label, unless that is −100.
            step: optimiser steps done.
            items: predicted tokens in the whole batch, of which this may be a part.
        """
        entries = sum(count for _, count in norms)
        mean = torch.stack([norm for norm, _ in norms]).sum() / entries
        here = (labels[:, 1:] != -100).sum() / items
        added: Tensor = self.weight * ramp(step, self.warmup_steps) * mean * here
        self._steps.add(step)
        self._sum = self._sum + added.detach()
        return added

    def read(self) -> dict[str, float]:
        """Its mean over the steps since it was last asked; ``loss`` includes it."""
        mean = float(self._sum) / max(1, len(self._steps))
        self._sum, self._steps = 0.0, set()
        return {"loss/l1": mean}
