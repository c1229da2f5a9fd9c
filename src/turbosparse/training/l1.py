"""What `SparseTrainer` adds to the loss of the tokens.

`L1Penalty` asks for more zeros than the data does: Combined is pressed towards zero, more and more
(ProSparse). Off unless a recipe has `l1`. The other is `predictors.loop`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from turbosparse.hf.change import change_combined


def ramp(step: int, warmup_steps: int) -> float:
    """From 0 to 1 in `warmup_steps`, along half a cosine wave; step 0 is the first."""
    if step >= warmup_steps:
        return 1.0
    return (1 - math.cos(math.pi * step / warmup_steps)) / 2


Sums = list[tuple[Tensor, int]]  # one over some entries, and how many these are


class Penalty:
    """`weight` × the mean of what `watch` finds in a batch, and the sum of it for the log."""

    name: str

    def __init__(self, weight: float, warmup_steps: int = 0):
        self.weight, self.warmup_steps = weight, warmup_steps
        self._sum: Any = 0.0  # a tensor: a number would wait for the device
        self._steps: set[int] = set()

    def watch(self, model: Any, step: int) -> AbstractContextManager[Sums]:
        """Gather sums in the forward passes inside, of the step after so many."""
        raise NotImplementedError

    def of(self, sums: Sums, labels: Tensor, *, step: int, items: Any) -> Tensor:
        """What a micro-batch adds to the loss, as its share of the batch's mean.

        Args:
            sums: what `watch` gave.
            labels: ``[B, T]``; a position predicts the next label, unless that is −100.
            step: optimiser steps done.
            items: predicted tokens in the whole batch, of which this may be a part.
        """
        entries = sum(count for _, count in sums)
        mean = torch.stack([part for part, _ in sums]).sum() / entries
        here = (labels[:, 1:] != -100).sum() / items
        added: Tensor = self.weight * ramp(step, self.warmup_steps) * mean * here
        self._steps.add(step)
        self._sum = self._sum + added.detach()
        return added

    def read(self, add_up: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Its mean over the steps since it was last asked; ``loss`` includes it.

        `add_up` sums a tensor over processes.
        """
        mean = float(add_up(torch.as_tensor(self._sum))) / max(1, len(self._steps))
        self._sum, self._steps = 0.0, set()
        return {f"loss/{self.name}": mean}


class L1Penalty(Penalty):
    """`weight` × mean |Combined| over all its entries."""

    name = "l1"

    @contextmanager
    def watch(self, model: Any, _step: int) -> Iterator[Sums]:
        """Gather the ‖Combined‖₁ of each FFN."""
        norms: Sums = []

        def gather(combined: Tensor) -> Tensor:
            if combined.requires_grad:  # else the sparsity meter is looking
                norms.append((combined.abs().sum(dtype=torch.float32), combined.numel()))
            return combined

        with change_combined(model, gather):
            yield norms
