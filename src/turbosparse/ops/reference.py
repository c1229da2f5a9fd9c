"""The truth for every kernel: plain PyTorch on weights dequantised to float32.

Shapes: T tokens, H hidden, I neurons, R rank of a predictor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import relu

from turbosparse.hf.activations import ACTIVATIONS, WITHOUT_ZEROS
from turbosparse.hf.ffn_activation import combined
from turbosparse.ops import Mode
from turbosparse.ops.predictor import PackedPredictor
from turbosparse.ops.quant import dequantise, dequantise_ffn, negative
from turbosparse.ops.rows import FFNRows, sign_bytes

Predict = Callable[[Tensor, Tensor], Tensor]  # x [T, H], residual [T, H] → candidates [T, I]


def sparse_ffn(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    activation: str,
    *,
    mode: Mode,
    candidates: Tensor | None = None,
    threshold: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The feed-forward of T tokens (Turbo Sparse §2).

    Args:
        x: ``[T, H]``.
        gate, up, down: ``[I, H]``, one row per neuron (`down` is the transposed down projection).
        activation: of the FFN record.
        mode: ``dense`` reads every row. ``exact`` reads an up row only where a gate is active,
            and a down row only where Combined is not zero; nothing is lost: what is skipped is
            exactly zero. ``predicted`` does so with the candidates, and takes the other neurons
            for inactive.
        candidates: of each token, bool ``[T, I]``; for predicted mode.
        threshold: of the FFN record: a gate at most this large is inactive.

    Returns:
        The output ``[T, H]``, and per token the number of candidates (all neurons in the other
        modes), of these those with an active gate, and those with Combined ≠ 0, int32 ``[T, 3]``.
        Where the activation is ungated, up is its own gate.
    """
    if mode != "dense" and activation in WITHOUT_ZEROS:
        raise ValueError(f"{activation} has no exact zeros to skip: use dense mode")
    if (mode == "predicted") != (candidates is not None):
        raise ValueError("predicted mode needs candidates, and the other modes take none")
    gated = ACTIVATIONS[activation].gated
    g = x @ (gate if gated else up).T
    offered = torch.full((len(x),), g.shape[1])
    if candidates is not None:
        g, offered = torch.where(candidates, g, 0.0), candidates.sum(1)
    if mode != "dense":
        read = (~(g <= threshold)).any(0).nonzero().squeeze(1)  # a NaN is kept
        g, up, down = g[:, read], up[read], down[read]
    c = combined(g, x @ up.T if gated else g, activation, threshold)
    counts = torch.stack((offered, g.gt(threshold).sum(1), c.ne(0).sum(1)), 1).int()
    if mode != "dense":
        read = c.ne(0).any(0).nonzero().squeeze(1)
        c, down = c[:, read], down[read]
    return c @ down, counts


def low_rank_candidates(h: Tensor, fc1: Tensor, fc2: Tensor, threshold: float) -> Tensor:
    """The neurons whose logit is at least the threshold, bool ``[T, I]``.

    Args:
        h: ``[T, H]``, what the predictor was made for: the FFN's input, or the residual before its
            norm.
        fc1: ``[R, H]``.
        fc2: ``[I, R]``.
        threshold: of the logits ``fc2 · relu(fc1 · h)``. A NaN logit is a candidate.
    """
    return ~(relu(h @ fc1.T) @ fc2.T < threshold)


def sign_candidates(x: Tensor, parts: Sequence[Tensor], threshold: float) -> Tensor:
    """The neurons whose signs agree with those of `x` often enough, bool ``[T, I]``.

    The score of a row is 2 · (share of columns that agree) − 1; each of the neuron's rows that
    decide must have at least the threshold.

    Args:
        x: ``[T, H]``, the FFN's input.
        parts: which weights are negative, bool ``[I, H]``: of the activation's ``zero_by``.
        threshold: of the scores, −1 to 1.
    """
    scores = torch.stack([sign_scores(x < 0, rows) for rows in parts])
    return (scores >= threshold).all(0)


def sign_scores(x: Tensor, rows: Tensor) -> Tensor:
    """1 − 2 · (share of columns that differ), float64 ``[T, I]``; bool ``[T, H]``, ``[I, H]``."""
    a, b = x.float(), rows.float()
    differ = a @ (1 - b).T + (1 - a) @ b.T  # whole numbers: exact
    return 1 - 2 * differ.double() / x.shape[1]


class Matrix:
    """A weight matrix ``[rows, cols]``."""

    def __init__(self, packed: NDArray[Any], cols: int, quant: str, threads: int):  # noqa: ARG002
        self.weight = dequantise(_tensor(packed), quant, cols)

    def matmul(self, x: Tensor) -> Tensor:
        """``[T, cols] → [T, rows]``."""
        return x @ self.weight.T

    def rows(self, indices: list[int]) -> Tensor:
        """Rows as float32 ``[n, cols]``: the embedding look-up."""
        return self.weight[indices]


class Neurons:
    """The rows of one feed-forward, and its predictor, if it has one."""

    def __init__(
        self,
        rows: FFNRows,
        activation: str,
        threads: int,  # noqa: ARG002
        predictor: PackedPredictor | None = None,
        threshold: float = 0.0,
    ):
        parts = dequantise_ffn(rows)
        self.gate, self.up, self.down = parts[0], parts[-2], parts[-1]
        self.activation, self.threshold = activation, threshold
        self.candidates = predictor and _predictor(predictor, rows.hidden)

    def forward(self, x: Tensor, residual: Tensor, *, mode: Mode) -> tuple[Tensor, Tensor]:
        """See `sparse_ffn`; `residual`, which x is the norm of, is for the predictor."""
        candidates = None
        if mode == "predicted":
            if self.candidates is None:
                raise ValueError("predicted mode needs a predictor")
            candidates = self.candidates(x, residual)
        return sparse_ffn(
            x,
            self.gate,
            self.up,
            self.down,
            self.activation,
            mode=mode,
            candidates=candidates,
            threshold=self.threshold,
        )


def _predictor(packed: PackedPredictor, hidden: int) -> Predict:
    about = packed.about
    if about.kind == "sign":
        signs = _tensor(packed.tensors["signs"]).split(sign_bytes(hidden), dim=1)
        parts = [negative(part, hidden) for part in signs]
        return lambda x, _: sign_candidates(x, parts, packed.threshold)
    fc1, fc2 = (_tensor(packed.tensors[name]) for name in ("fc1", "fc2"))
    first = dequantise(fc1, str(about.quant), hidden)
    second = dequantise(fc2, str(about.quant), len(fc1))
    return lambda x, residual: low_rank_candidates(
        residual if about.input == "pre_norm" else x, first, second, packed.threshold
    )


def _tensor(packed: NDArray[Any]) -> Tensor:
    # copied, for the map is read-only, which torch cannot express
    return torch.from_numpy(packed.copy()).to(torch.get_default_device())
