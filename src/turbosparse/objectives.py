"""Additions to training, each off unless its recipe key is given; `SparseTrainer` calls them.

- `distill`: the logits follow those of a teacher, such as the dense model.
- `l1`: Combined is pressed towards zero, more and more, as ProSparse does.
- `staged_steps`: the activation goes over from SwiGLU to the model's own bit by bit.

Shapes: B sequences, T tokens, V vocabulary, N rows, I neurons.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from turbosparse.hf.observe import change_combined

if TYPE_CHECKING:
    from turbosparse.train import Recipe


def distillation(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """temperature² · KL(teacher ‖ student) in nats, summed over the predicted tokens.

    Args:
        student, teacher: logits ``[B, T, V]``.
        labels: ``[B, T]``; a position predicts the next label, unless that is −100.
    """
    predicted = labels[:, 1:] != -100
    log_p = (teacher[:, :-1][predicted].float() / temperature).log_softmax(-1)
    log_q = (student[:, :-1][predicted].float() / temperature).log_softmax(-1)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum()


def ramp(step: int, warmup_steps: int) -> float:
    """From 0 to 1 in `warmup_steps`, along half a cosine wave; step 0 is the first."""
    if step >= warmup_steps:
        return 1.0
    return (1 - math.cos(math.pi * step / warmup_steps)) / 2


def blend(gate: Tensor, up: Tensor, combined: Tensor, share: float) -> Tensor:
    """`share` of the model's own Combined ``[N, I]`` and the rest of SwiGLU's."""
    return torch.lerp(silu(gate) * up, combined, share)


def staged_share(step: int, staged_steps: int | None) -> float:
    """How much of the model's own activation a step has: it grows by the step, from 0 to 1."""
    return min(1.0, step / staged_steps) if staged_steps else 1.0


class Objectives:
    """What a recipe adds to the loss of a forward pass, and the sums of it for the log."""

    def __init__(self, recipe: Recipe, teacher: Any = None):
        self.distill, self.l1, self.staged_steps = recipe.distill, recipe.l1, recipe.staged_steps
        self.teacher = teacher
        self._sums: dict[str, Any] = {}  # tensors: a number would wait for the device
        self._steps: set[int] = set()

    def __bool__(self) -> bool:
        return bool(self.distill or self.l1 or self.staged_steps)

    @contextmanager
    def watch(self, model: Any, step: int) -> Iterator[list[tuple[Tensor, int]]]:
        """Blend the activation inside, and gather each FFN's ‖Combined‖₁ and number of entries."""
        share = staged_share(step, self.staged_steps)
        norms: list[tuple[Tensor, int]] = []

        def change(_layer: int, gate: Tensor, up: Tensor, combined: Tensor) -> Tensor:
            if share < 1:
                combined = blend(gate, up, combined, share)
            if self.l1 and combined.requires_grad:  # else the sparsity meter is looking
                norms.append((combined.abs().sum(dtype=torch.float32), combined.numel()))
            return combined

        if share == 1 and not self.l1:
            yield norms
            return
        with change_combined(model, change):
            yield norms

    def extra(
        self,
        inputs: dict[str, Any],
        logits: Tensor,
        norms: list[tuple[Tensor, int]],
        *,
        step: int,
        items: Any,
    ) -> Tensor | float:
        """What comes on top of the loss of a micro-batch, as a share of the batch's mean.

        Args:
            inputs: of the model, with ``labels``.
            logits: the model's answer, ``[B, T, V]``.
            norms: what `watch` gave.
            step: optimiser steps done.
            items: predicted tokens in the whole batch, of which this may be a part.
        """
        parts: dict[str, Tensor] = {}
        if self.distill:
            with torch.no_grad():
                asked = {key: value for key, value in inputs.items() if key != "labels"}
                taught = self.teacher(**asked, use_cache=False).logits
            kl = distillation(logits, taught, inputs["labels"], self.distill.temperature)
            parts["loss/distill"] = self.distill.weight * kl / items
        if self.l1:
            entries = sum(count for _, count in norms)
            mean = torch.stack([norm for norm, _ in norms]).sum() / entries
            here = (inputs["labels"][:, 1:] != -100).sum() / items
            weight = self.l1.weight * ramp(step, self.l1.warmup_steps)
            parts["loss/l1"] = weight * mean * here
        self._steps.add(step)
        for name, part in parts.items():
            self._sums[name] = self._sums.get(name, 0.0) + part.detach()
        return sum(parts.values(), 0.0)

    def read(self) -> dict[str, float]:
        """The mean of each part over the steps since it was last asked; ``loss`` includes them."""
        means = {name: float(total) / len(self._steps) for name, total in self._sums.items()}
        if self.staged_steps:
            means["staged_share"] = staged_share(max(self._steps), self.staged_steps)
        self._sums, self._steps = {}, set()
        return means
