"""One feed-forward trained alone: gate, up and down, towards the output that is wanted.

No attention, no head and no other layer takes part, so a token costs less than in training the
model, and all tokens of a layer can be mixed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import linear

from turbosparse.base.machine import uses_bf16
from turbosparse.hf.ffn_activation import combined
from turbosparse.hf.surgery import FFN

_TOKENS = 512  # of a step
_RATE = 0.03  # of a matrix's root mean square: the same for all models
_WARMUP = 0.05  # of the steps; then a cosine to zero
_BETAS = (0.9, 0.95)


@torch.enable_grad()
def reconstruct(new: FFN, x: Tensor, wanted: Tensor, passes: int, cut: float = 0.0) -> FFN:
    """Train a dReLU FFN to give what is wanted on x.

    The loss is the squared error, of outputs larger than the median relative to their own: the
    massive ones of first tokens would else be all that is learnt. Products are in bfloat16 where
    the machine computes in it, as in `turbosparse train`; weights and moments are float32.

    Args:
        x: what it reads, ``[N, H]``.
        wanted: what it shall give, ``[N, H]``.
        passes: over x, in another order each time.
        cut: a gate at most this large counts as zero.

    Returns:
        The trained FFN, float32.
    """
    type_ = torch.bfloat16 if uses_bf16("auto") else new.gate.dtype
    with torch.no_grad():
        x, wanted = x.to(type_), wanted.to(type_)
        size = wanted.float().square().mean(-1, keepdim=True)
        weight_of = 1 / size.clamp(min=float(size.median()) + 1e-20)
    trained = [weight.detach().float().clone().requires_grad_() for weight in new]
    used = [weight.detach().to(type_).requires_grad_() for weight in trained]
    groups = [
        {"params": [p], "lr": _RATE * float(p.detach().square().mean().sqrt())} for p in trained
    ]
    optimiser = torch.optim.AdamW(groups, betas=_BETAS, weight_decay=0.0, fused=True)
    each = -(-len(x) // _TOKENS)
    steps = each * passes
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _share(step, steps))
    random = torch.Generator().manual_seed(0)
    for _ in range(passes):
        for rows in torch.randperm(len(x), generator=random).tensor_split(each):
            rows = rows.to(x.device)
            active = combined(linear(x[rows], used[0]), linear(x[rows], used[1]), "drelu", cut)
            error = linear(active, used[2]).float() - wanted[rows].float()
            (error.square() * weight_of[rows]).mean().backward()
            for weight, master in zip(used, trained, strict=True):
                assert weight.grad is not None
                master.grad, weight.grad = weight.grad.float(), None
            optimiser.step()
            schedule.step()
            with torch.no_grad():
                for weight, master in zip(used, trained, strict=True):
                    weight.copy_(master)
    return FFN(*(weight.detach() for weight in trained))


def _share(step: int, steps: int) -> float:
    """Of the learning rate, at a step."""
    return min(1.0, (step + 1) / (_WARMUP * steps)) * (1 + math.cos(math.pi * step / steps)) / 2
