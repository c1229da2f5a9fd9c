"""Surgery that looks at text first: it keeps the halves of neurons that add most, and refits.

A SwiGLU neuron adds ``silu(g)·u·d`` to the residual stream: g and u are its gate and up
pre-activations, d its column of the down projection. Where g > 0 that is the sum of two dReLU
neurons: ``relu(g)·relu(u)·d``, and ``relu(g)·relu(-u)·(-d)``, for the other half of u. An FFN of I
neurons has 2·I such halves; dReLU by itself keeps the first of each pair, whatever it adds
(Turbo Sparse §3.2). Here those are kept that add most to the output on a text, and the down
projection is fitted anew, for what is kept to come as near the dense output as it can.

All of it takes one forward pass, in which each FFN is changed just before it runs: the layers after
it already see its new output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import linear

from turbosparse.base.progress import track
from turbosparse.hf.ffn_activation import combined

_ROWS = 4096  # tokens at a time, for their Combined vectors are wide
_RIDGE = 0.01  # weight of the old down projection, in mean squares of Combined


@torch.no_grad()
def calibrate(
    model: Any, rows: list[list[int]], *, neurons: int | None = None
) -> list[list[float | None]]:
    """Give a model with the weights of a SwiGLU model those that suit dReLU better.

    Args:
        model: of a class whose activation is drelu.
        rows: token ids of text, all of one length.
        neurons: of each new FFN, up to twice those of the old; by default as many as it had.

    Returns:
        ``[layer][expert]`` (one expert if dense): share of the variance of the dense FFN's output
        on `rows` that the new FFN accounts for; None where that does not vary, as of an expert that
        no token was sent to.
    """
    config = model.config
    neurons = neurons or config.intermediate_size
    explained: list[list[float | None]] = []
    layers = track(model.model.layers, "calibrating")

    def dense(mlp: Any, inputs: tuple[Tensor, ...]) -> None:
        parts = [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        gate, up, down = (part.weight for part in parts)
        *weights, share = fit(gate, up, down, inputs[0].flatten(0, -2), neurons)
        for part, weight in zip(parts, weights, strict=True):
            part.weight = Parameter(weight)
        explained.append([share])
        next(layers, None)

    def experts(module: Any, inputs: tuple[Tensor, ...]) -> None:
        x, chosen = inputs[0], inputs[1]
        fitted = []
        for expert in range(len(module.down_proj)):
            gate, up = module.gate_up_proj[expert].chunk(2)
            mine = x[(chosen == expert).any(-1)]
            fitted.append(fit(gate, up, module.down_proj[expert], mine, neurons))
        module.gate_up_proj = Parameter(torch.stack([torch.cat(new[:2]) for new in fitted]))
        module.down_proj = Parameter(torch.stack([new[2] for new in fitted]))
        explained.append([new[3] for new in fitted])
        next(layers, None)

    handles = [
        block.mlp.experts.register_forward_pre_hook(experts)
        if hasattr(block.mlp, "experts")
        else block.mlp.register_forward_pre_hook(dense)
        for block in model.model.layers
    ]
    next(layers)  # shows the bar
    try:
        model.model(torch.tensor(rows, device=model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        layers.close()
    config.intermediate_size = neurons
    return explained


def fit(
    gate: Tensor, up: Tensor, down: Tensor, x: Tensor, neurons: int
) -> tuple[Tensor, Tensor, Tensor, float | None]:
    """The dReLU FFN that comes near a SwiGLU FFN.

    Args:
        gate, up: of the SwiGLU FFN, ``[I, hidden]``.
        down: ``[hidden, I]``.
        x: what the FFN reads, ``[N, hidden]``.
        neurons: of the dReLU FFN, at most 2·I.

    Returns:
        gate, up and down of the dReLU FFN, and the share of the variance of the SwiGLU FFN's output
        on `x` that its own accounts for; None if there is no variance.
    """
    dtype = gate.dtype
    x, gate, up, down = x.float(), gate.float(), up.float(), down.float()
    added = torch.zeros(2, len(gate), device=x.device)
    for rows in x.split(_ROWS):
        g, u = linear(rows, gate), linear(rows, up)
        added[0] += combined(g, u, "drelu").square().sum(0)
        added[1] += combined(g, -u, "drelu").square().sum(0)
    added *= down.square().sum(0)
    kept = torch.arange(neurons, device=x.device)
    if added.any():
        kept = added.flatten().topk(neurons).indices.sort().values
    of, sign = kept % len(gate), 1.0 - 2 * (kept // len(gate))
    new_gate, new_up, new_down = gate[of], up[of] * sign[:, None], down[:, of] * sign
    if not len(x):
        return new_gate.to(dtype), new_up.to(dtype), new_down.to(dtype), None

    inner = torch.zeros(neurons, neurons, device=x.device)
    outer = torch.zeros_like(new_down)
    square, mean = torch.zeros(2, len(down), device=x.device)
    for rows in x.split(_ROWS):
        active = combined(linear(rows, new_gate), linear(rows, new_up), "drelu")
        y = linear(combined(linear(rows, gate), linear(rows, up), "swiglu"), down)
        inner += active.T @ active
        outer += y.T @ active
        square += y.square().sum(0)
        mean += y.sum(0) / len(x)
    # least squares that keep to new_down where the text says little
    ridge = (_RIDGE * inner.diagonal().mean()).clamp(min=1e-20)
    factor = torch.linalg.cholesky(inner + ridge * torch.eye(neurons, device=x.device))
    new_down = torch.cholesky_solve((outer + ridge * new_down).T, factor).T
    left = square - 2 * (new_down * outer).sum(1) + (new_down @ inner * new_down).sum(1)
    variance = float((square - len(x) * mean.square()).sum())
    explained = 1 - float(left.sum()) / variance if variance > 0 else None
    return new_gate.to(dtype), new_up.to(dtype), new_down.to(dtype), explained
