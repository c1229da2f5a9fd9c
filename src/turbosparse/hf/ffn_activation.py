"""The feed-forward activations. This file also travels inside exported models."""

import torch
from torch.nn.functional import gelu, relu, silu
from torch.nn.functional import threshold as cut


def combined(
    gate: torch.Tensor, up: torch.Tensor, activation: str, threshold: float = 0.0
) -> torch.Tensor:
    """The intermediate vector that ``down_proj`` reads (Turbo Sparse §2 eq. 1, §3.2 eq. 2).

    Args:
        gate, up: pre-activations ``x·W_gate`` and ``x·W_up``, ``[..., neurons]``.
        activation: its name. ``relu`` and ``relu2`` are ungated: they ignore `gate`.
        threshold: a gate at most this large counts as zero: FATReLU (ProSparse, arXiv 2402.13516).
    """
    if threshold:
        gate = cut(gate, threshold, 0.0)
    if activation == "drelu":
        return relu(gate) * relu(up)
    if activation == "geglu":
        return gelu(gate) * up
    if activation == "reglu":
        return relu(gate) * up
    if activation == "relu":
        return relu(up)
    if activation == "relu2":
        return relu(up).square()
    if activation == "swiglu":
        return silu(gate) * up
    raise ValueError(f"unknown ffn_activation {activation!r}")
