"""The cross-entropy of a model's head without its logits: a few tokens at a time.

Of 4,096 tokens and a vocabulary of 49,152 the logits alone take 0.8 GB in float32, and the library
holds several such arrays at once. Here the gradients are made with the loss, so that nothing is
computed twice and no more than the logits of a chunk exist.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

_ENTRIES = 1 << 25  # of the logits of a chunk


@contextmanager
def chunked_loss(model: Any) -> Iterator[None]:
    """Within it the model's loss is computed so, and its `logits` are the head's inputs."""
    head, whole = model.lm_head, model.loss_function

    def loss(logits: Tensor, labels: Tensor, *_: Any, **named: Any) -> Tensor:
        targets = pad(labels, (0, 1), value=-100)[..., 1:].flatten()
        items = named.get("num_items_in_batch")
        items = (targets != -100).sum() if items is None else items
        summed: Tensor = _Loss.apply(  # type: ignore[no-untyped-call]
            logits.flatten(0, -2), head.weight, targets
        )
        return summed / items

    head.forward = lambda hidden: hidden
    model.loss_function = loss
    try:
        yield
    finally:
        del head.forward
        model.loss_function = whole


class _Loss(torch.autograd.Function):
    """Σ cross-entropy of inputs ``[N, H]``, a head ``[V, H]`` and labels ``[N]``; −100 is none."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        device, type_ = hidden.device.type, hidden.dtype
        if torch.is_autocast_enabled(device):
            type_ = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            used, total = weight.to(type_), torch.zeros((), device=hidden.device)
            to_hidden = torch.empty_like(hidden)
            to_weight = torch.zeros_like(weight, dtype=torch.float32)
            size = max(1, _ENTRIES // len(weight))
            for rows in torch.arange(len(hidden), device=hidden.device).split(size):
                x, labels = hidden[rows].to(type_), targets[rows, None]
                logits = linear(x, used).float()
                known, labels = labels != -100, labels.clamp(min=0)
                logs = logits.log_softmax(-1)
                total -= (logs.gather(-1, labels) * known).sum()
                slopes = logs.exp_()
                slopes.scatter_add_(-1, labels, slopes.new_full(labels.shape, -1.0))
                slopes = slopes.mul_(known).to(type_)
                to_hidden[rows] = (slopes @ used).to(hidden.dtype)
                to_weight += slopes.T @ x
        ctx.save_for_backward(to_hidden, to_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, Tensor, None]:
        to_hidden, to_weight = ctx.saved_tensors
        return to_hidden * slopes[0], to_weight * slopes[0], None
