"""The loss of a model's head without its logits: a few tokens at a time.

Of 4,096 tokens and a vocabulary of 49,152 the logits alone take 0.8 GB in float32, and the library
holds several such arrays at once. Here the gradients are made with the loss, so that nothing is
computed twice and no more than the logits of a chunk exist. So a teacher's whole distribution can
be learnt from: it does not outlive its chunk either.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

_ENTRIES = 1 << 25  # of the logits of a chunk


@dataclass(frozen=True)
class Teacher:
    """A dense model whose next-token probabilities are learnt besides the text (distillation)."""

    model: Any
    weight: float  # of its distribution in what is learnt; the token of the text has the rest


@contextmanager
def chunked_loss(model: Any, teacher: Teacher | None = None) -> Iterator[None]:
    """Within it the model's loss is computed so, and its `logits` are the head's inputs.

    With a teacher of weight w the loss is (1 − w) × the cross-entropy of the text + w × the
    Kullback-Leibler divergence of the model from the teacher.
    """
    head, whole = model.lm_head, model.loss_function
    taught: list[Tensor] = []

    def ask(_model: Any, _args: Any, inputs: dict[str, Any]) -> None:
        assert teacher
        seen = {name: inputs.get(name) for name in ("input_ids", "attention_mask", "position_ids")}
        with torch.no_grad():
            taught[:] = [teacher.model.model(**seen, use_cache=False).last_hidden_state]

    def loss(logits: Tensor, labels: Tensor, *_: Any, **named: Any) -> Tensor:
        targets = pad(labels, (0, 1), value=-100)[..., 1:].flatten()
        items = named.get("num_items_in_batch")
        items = (targets != -100).sum() if items is None else items
        summed: Tensor = _Loss.apply(  # type: ignore[no-untyped-call]
            logits.flatten(0, -2),
            head.weight,
            targets,
            teacher,
            *(x.flatten(0, -2) for x in taught),
        )
        return summed / items

    head.forward = lambda hidden: hidden
    model.loss_function = loss
    hook = model.register_forward_pre_hook(ask, with_kwargs=True) if teacher else None
    try:
        yield
    finally:
        del head.forward
        model.loss_function = whole
        if hook:
            hook.remove()


class _Loss(torch.autograd.Function):
    """The sum over tokens; of inputs ``[N, H]``, a head ``[V, H]`` and labels ``[N]``; −100: none.

    After the teacher come the inputs of its own head.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        teacher: Teacher | None,
        *taught: Tensor,
    ) -> Tensor:
        device, type_ = hidden.device.type, hidden.dtype
        if torch.is_autocast_enabled(device):
            type_ = torch.get_autocast_dtype(device)
        text = 1 - teacher.weight if teacher else 1.0
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
                total -= text * (logs.gather(-1, labels) * known).sum()
                wanted = None
                if teacher:
                    wanted = _probabilities(teacher.model.lm_head.weight, taught[0][rows], logs)
                    missed = torch.xlogy(wanted, wanted) - wanted * logs
                    total += teacher.weight * (missed * known).sum()
                slopes = logs.exp_()
                slopes.scatter_add_(-1, labels, slopes.new_full(labels.shape, -text))
                if teacher and wanted is not None:
                    slopes.sub_(wanted, alpha=teacher.weight)
                slopes = slopes.mul_(known).to(type_)
                to_hidden[rows] = (slopes @ used).to(hidden.dtype)
                to_weight += slopes.T @ x
        ctx.save_for_backward(to_hidden, to_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        to_hidden, to_weight = ctx.saved_tensors
        return (
            to_hidden * slopes[0],
            to_weight * slopes[0],
            *[None] * (len(ctx.needs_input_grad) - 2),
        )


def _probabilities(head: Tensor, hidden: Tensor, like: Tensor) -> Tensor:
    """Of the teacher's tokens; none for tokens that only the model has."""
    found = linear(hidden.to(head.dtype), head).float().softmax(-1)
    return pad(found, (0, like.shape[-1] - found.shape[-1]))
