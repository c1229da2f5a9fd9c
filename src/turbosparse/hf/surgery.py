"""Surgery that looks at text first: it keeps the halves of neurons that add most, and refits.

A SwiGLU neuron adds ``silu(g)·u·d`` to the residual stream: g and u are its gate and up
pre-activations, d its column of the down projection. Where g > 0 that is the sum of two dReLU
neurons: ``relu(g)·relu(u)·d``, and ``relu(g)·relu(-u)·(-d)``, for the other half of u. An FFN of I
neurons has 2·I such halves; dReLU by itself keeps the first of each pair, whatever it adds
(Turbo Sparse §3.2). Here those are kept that add most to the output on a text, and the down
projection is fitted again, so that what is kept comes as near the dense output as it can.

The layers are changed in order, each on the hidden states that the changed layers before it give
(`conversion`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from turbosparse.base.errors import TurboSparseError
from turbosparse.hf.ffn_activation import combined

_ROWS = 2048  # tokens at a time, for their Combined vectors are wide
_RIDGE = 0.01  # weight of the old down projection, in mean squares of Combined
_MASSIVE = 0.01  # share of neurons that may be far larger than the rest: the ridge ignores them
_FAR = 65504.0  # a Combined or output beyond half precision is an overflow, not an activation


class FFN(NamedTuple):
    """The weights of one feed-forward: gate and up ``[I, H]``, down ``[H, I]``."""

    gate: Tensor
    up: Tensor
    down: Tensor

    def to(self, dtype: torch.dtype) -> FFN:
        return FFN(*(weight.to(dtype) for weight in self))

    def combined(self, x: Tensor, activation: str, cut: float = 0.0) -> Tensor:
        """Products in the type of the weights, the rest in float32."""
        x = x.to(self.gate.dtype)
        gate, up = linear(x, self.gate).float(), linear(x, self.up).float()
        return combined(gate, up, activation, cut)

    def output(self, x: Tensor, activation: str, cut: float = 0.0) -> Tensor:
        """``[N, H]`` float32, of some rows at a time."""
        active = (self.combined(rows, activation, cut) for rows in x.split(_ROWS))
        parts = (rows.to(self.down.dtype) for rows in active)
        return torch.cat([linear(rows, self.down).float() for rows in parts])


def weights_of(mlp: Any) -> list[FFN]:
    """Of a layer's feed-forward, or of each of its experts; without a gate, up stands for it."""
    if not hasattr(mlp, "experts"):
        gate = getattr(mlp, "gate_proj", mlp.up_proj)
        return [FFN(gate.weight, mlp.up_proj.weight, mlp.down_proj.weight)]
    pairs = zip(mlp.experts.gate_up_proj, mlp.experts.down_proj, strict=True)
    halves = ((*gate_up.chunk(2), down) for gate_up, down in pairs)
    return [FFN(gate, up, down) for gate, up, down in halves]


@torch.no_grad()
def fit(
    old: FFN,
    x: Tensor,
    wanted: Tensor,
    neurons: int,
    *,
    cut: float = 0.0,
    where: str = "the feed-forward",
) -> FFN:
    """The dReLU FFN made of a SwiGLU FFN that comes near what is wanted; its down is float32.

    Args:
        old: of the SwiGLU FFN.
        x: what the FFN reads, ``[N, H]``.
        wanted: what it shall give, ``[N, H]``.
        neurons: of the dReLU FFN, at most 2·I.
        cut: a gate at most this large counts as zero, once they are scaled (`with_usual_gates`).
        where: what messages call it.

    Raises:
        TurboSparseError: its weights or outputs are NaN, infinite or too large to be real.
    """
    kept, sign = _halves(old, x, neurons)
    sign = sign.to(old.up.dtype)
    new = FFN(old.gate[kept], old.up[kept] * sign[:, None], old.down[:, kept] * sign)
    if not len(x):
        return new
    if cut:
        new = with_usual_gates(new, x)
    inner = torch.zeros(neurons, neurons, device=x.device)
    outer = torch.zeros(new.down.shape, device=x.device)
    for rows, y in zip(x.split(_ROWS), wanted.split(_ROWS), strict=True):
        active = new.combined(rows, "drelu", cut)
        inner.addmm_(active.T, active)
        outer.addmm_(y.T, active)
    if not _is_sound(inner, outer, len(x)):
        raise TurboSparseError(
            f"{where}: its outputs on the text are NaN, infinite or too large to be real; "
            "check the weights of the model"
        )
    return new._replace(down=_refit(inner, outer, new.down.float()))


def _halves(old: FFN, x: Tensor, neurons: int) -> tuple[Tensor, Tensor]:
    """The halves of neurons that add most on x: their numbers and signs, ``[neurons]`` each."""
    added = torch.zeros(2, len(old.gate), device=x.device)
    for rows in x.split(_ROWS):
        rows = rows.to(old.gate.dtype)
        g, u = linear(rows, old.gate).float(), linear(rows, old.up).float()
        added[0] += combined(g, u, "drelu").square().sum(0)
        added[1] += combined(g, -u, "drelu").square().sum(0)
    added *= old.down.float().square().sum(0)
    kept = torch.arange(neurons, device=x.device)
    if added.any():
        kept = added.flatten().topk(neurons).indices.sort().values
    return kept % len(old.gate), 1.0 - 2 * (kept // len(old.gate))


def with_usual_gates(ffn: FFN, x: Tensor) -> FFN:
    """The same dReLU FFN with gates of a mean of 1 where they are positive on x; ups make up."""
    total, count = torch.zeros(2, device=x.device)
    for rows in x.split(_ROWS):
        gate = linear(rows.to(ffn.gate.dtype), ffn.gate).float().clamp(min=0)
        total += gate.sum()
        count += gate.count_nonzero()
    usual = float(total / count) if count else 1.0
    return ffn._replace(gate=ffn.gate / usual, up=ffn.up * usual)


def _is_sound(inner: Tensor, outer: Tensor, rows: int) -> bool:
    most = _FAR**2 * rows
    return bool(inner.isfinite().all() and outer.isfinite().all() and inner.diagonal().max() < most)


def _refit(inner: Tensor, outer: Tensor, down: Tensor) -> Tensor:
    """Least squares that keep to the old down projection where the text says little.

    Args:
        inner: Σ Combined·Combinedᵀ, ``[I, I]``; overwritten.
        outer: Σ wanted output·Combinedᵀ, ``[H, I]``.
        down: ``[H, I]``.

    The ridge is a share of the mean square of the neurons, but for the few largest: massive
    activations would else freeze all the others. Rows and columns are scaled to a diagonal of one
    before the factorisation, so that float32 suffices for any mixture of sizes.
    """
    squares = inner.diagonal().clone()
    usual = squares.sort().values[: max(1, round((1 - _MASSIVE) * len(squares)))]
    ridge = (_RIDGE * usual.mean()).clamp(min=1e-20)
    scale = (squares + ridge).rsqrt()
    inner.diagonal().add_(ridge)
    inner.mul_(scale).mul_(scale[:, None])
    factor = torch.linalg.cholesky(inner)
    return torch.cholesky_solve(((outer + ridge * down) * scale).T, factor).T * scale


@torch.no_grad()
def explained(new: FFN, x: Tensor, wanted: Tensor, cut: float = 0.0) -> float | None:
    """Share of the variance of what is wanted on x that a dReLU FFN accounts for."""
    variance = float((wanted - wanted.mean(0)).square().sum())
    left = float((wanted - new.output(x, "drelu", cut)).square().sum())
    return 1 - left / variance if variance > 0 else None
