"""Triton kernels behind the interface of `reference`: weights stay packed, in the card's memory.

A pass of up to `FEW` tokens runs the kernels and waits for nothing, so it can be captured as a CUDA
graph; a longer one unpacks a matrix at a time to float32 and multiplies with torch. Where there is
no card, ``TRITON_INTERPRET=1`` runs the kernels on the processor, slowly: for tests.

Shapes: T tokens, H hidden, I neurons, E experts, of which a token uses K.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from turbosparse import _core
from turbosparse.base.errors import TurboSparseError
from turbosparse.hf.activations import ACTIVATIONS, WITHOUT_ZEROS
from turbosparse.ops import Mode
from turbosparse.ops.predictor import PackedPredictor
from turbosparse.ops.quant import CODES, negative
from turbosparse.ops.reference import low_rank_candidates, sign_candidates, sparse_ffn
from turbosparse.ops.rows import FFNRows, row_bytes, sign_bytes

try:
    import triton

    from turbosparse.ops import gpu_kernels as kernels
except ImportError as error:
    raise TurboSparseError("backend gpu needs triton: pip install 'turbosparse[gpu]'") from error

FEW = 16  # tokens
# Rows of a program, and programs that share a sum over neurons. So chosen that a 7B model gives
# hundreds of programs with 4 to 8 KiB under way in each; not tuned, for no card was there.
ROWS, DOWN_ROWS, SPLITS = 16, 8, 32
SPAN = _core.Neurons.SPAN


def device() -> torch.device:
    """Where the kernels run.

    Raises:
        TurboSparseError: there is no card.
    """
    if torch.cuda.is_available():
        return torch.device("cuda")
    if triton.knobs.runtime.interpret:
        return torch.device("cpu")
    raise TurboSparseError(
        f"backend gpu needs an NVIDIA GPU, and torch {torch.__version__} finds none: see whether "
        "nvidia-smi lists one and torch is built for CUDA, or use --backend cpu"
    )


class Rows(NamedTuple):
    """Packed rows of E matrices of one shape."""

    packed: Tensor  # uint8 [E, n, bytes]; what the rows stand for may be less than their stride
    cols: int
    quant: str  # or f32, which is no packed one

    def unpack(self, expert: int = 0, indices: Tensor | None = None) -> Tensor:
        """All rows of an expert, or these, as float32 ``[n, cols]``."""
        packed = self.packed[expert]
        count = len(packed if indices is None else indices)
        out = torch.empty(count, self.cols, device=packed.device)
        grid = triton.cdiv(count, ROWS), triton.cdiv(self.cols, 512)
        kernels.unpack[grid](
            out, packed, indices, self._codes, count, packed.stride(0),
            self.quant, self.cols, ROWS,
        )  # fmt: skip
        return out

    def matvec(
        self,
        x: Tensor,
        *,
        bias: Tensor | None = None,
        chosen: Tensor | None = None,
        relu: bool = False,
    ) -> Tensor:
        """``[T, cols]`` × the rows → ``[T, n]``, or with chosen experts ``[T · K, n]``."""
        experts = 1 if chosen is None else chosen.shape[1]
        total, count = len(x) * experts, self.packed.shape[1]
        together = FEW if chosen is None else 1
        out = torch.empty(total, count, device=x.device)
        kernels.matvec[triton.cdiv(count, ROWS), triton.cdiv(total, together)](
            out, self.packed, x.contiguous(), bias, chosen, self._codes, total, count,
            self.packed.stride(1), experts, relu, self.quant, self.cols, ROWS, together,
        )  # fmt: skip
        return out

    @property
    def _codes(self) -> Tensor:
        return _codes(self.packed.device)


class Lists(NamedTuple):
    """Neurons of each token and expert, by segments; V = T · K, S segments."""

    neurons: Tensor  # int32 [V, S, SEGMENT]
    values: Tensor  # float32 [V, S, SEGMENT]
    tallies: Tensor  # int32 [3, V, S]: how many, above the threshold, and not zero

    @classmethod
    def empty(cls, x: Tensor, neurons: int, chosen: Tensor | None) -> Lists:
        total = len(x) if chosen is None else chosen.numel()
        shape = total, triton.cdiv(neurons, kernels.SEGMENT)
        lists = torch.empty(*shape, kernels.SEGMENT, dtype=torch.int32, device=x.device)
        tallies = torch.empty(3, *shape, dtype=torch.int32, device=x.device)
        return cls(lists, torch.empty_like(lists, dtype=torch.float32), tallies)


def select(
    x: Tensor,
    rows: Rows,
    stage: str,
    thresholds: Tensor,
    chosen: Tensor | None,
    *,
    before: Lists | None = None,
    gated: bool = False,
    dense: bool = False,
) -> Lists:
    """The listed neurons that stay, and what was computed of them; see `gpu_kernels.select`.

    Args:
        x: ``[T, cols]``.
        rows: of the experts' neurons.
        stage: ``candidates``, ``gates`` or an activation.
        thresholds: of each expert.
        chosen: experts of each token ``[T, K]``; None in a dense model.
        before: the lists to read; by default all neurons.
        gated: `before` holds gates.
        dense: all stay.
    """
    count = rows.packed.shape[1]
    out = Lists.empty(x, count, chosen)
    given, values, lengths = before or (None, None, None)
    kernels.select[out.neurons.shape[:2]](
        *out, rows.packed, x, chosen, thresholds, rows._codes,
        given, values if gated else None, lengths, count, rows.packed.stride(1),
        stage, dense, 1 if chosen is None else chosen.shape[1], rows.quant, rows.cols,
        ROWS, kernels.SEGMENT,
    )  # fmt: skip
    return out


class Matrix:
    """A weight matrix ``[rows, cols]``."""

    def __init__(self, packed: NDArray[Any], cols: int, quant: str, threads: int = 1):  # noqa: ARG002
        self.weight = Rows(_tensor(packed)[None], cols, quant)

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``[T, cols] → [T, rows]``."""
        if len(x) <= FEW:
            return self.weight.matvec(x, bias=bias)
        y = x @ self.weight.unpack().T
        return y if bias is None else y + bias

    def rows(self, indices: Tensor | list[int]) -> Tensor:
        """Rows as float32 ``[n, cols]``: the embedding look-up."""
        at = torch.as_tensor(indices, device=self.weight.packed.device)
        return self.weight.unpack(indices=at)


class Experts:
    """The feed-forwards of a layer, one after the other.

    Args:
        rows: of each expert; a dense model has one.
        activation, threshold: of the FFN record.
        predictors: of each expert, or none.

    Attributes:
        parts: uint8 tensors ``[E, I, bytes]`` of all that belongs to a neuron.
        uses: int32 ``[E, spans]``, or None: a pass of few tokens, not in dense mode, adds how many
            neurons of each `SPAN` were active.

    Raises:
        TurboSparseError: predictors of one layer that differ in rank.
    """

    def __init__(
        self,
        rows: Sequence[FFNRows],
        activation: str,
        predictors: Sequence[PackedPredictor] = (),
        threshold: float = 0.0,
    ):
        hidden, quants = rows[0].hidden, rows[0].quants
        gates, pairs = (
            _tensor(np.stack([getattr(one, part) for one in rows])) for part in ("gates", "pairs")
        )
        self.activation, self.gated = activation, ACTIVATIONS[activation].gated
        self.parts = [gates, pairs]
        self.uses: Tensor | None = None
        self.gate = self.up = Rows(gates, hidden, quants[0])
        if self.gated:
            self.up = Rows(pairs, hidden, quants[1])
            pairs = pairs[..., row_bytes(quants[1], hidden) :]
        self.down = Rows(pairs, hidden, quants[-1])
        self.threshold = threshold
        self.thresholds = torch.full((len(rows),), threshold, device=gates.device)
        self.predictor: _LowRank | _Signs | None = None
        if predictors:
            kind = _Signs if predictors[0].about.kind == "sign" else _LowRank
            self.predictor = kind(predictors, hidden)
            self.parts.append(self.predictor.of_neurons)

    def forward(
        self,
        x: Tensor,
        residual: Tensor,
        *,
        mode: Mode,
        chosen: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The weighted sum of the chosen experts ``[T, H]``, and their counts, summed ``[T, 3]``.

        Args:
            x, residual, mode: see `reference.Neurons.forward`.
            chosen: experts of each token, int32 ``[T, K]``; None in a dense model.
            weights: of these, float32 ``[T, K]``.

        Raises:
            ValueError: a mode that the feed-forward does not have.
        """
        if mode != "dense" and self.activation in WITHOUT_ZEROS:
            raise ValueError(f"{self.activation} has no exact zeros to skip: use dense mode")
        if mode == "predicted" and self.predictor is None:
            raise ValueError("predicted mode needs a predictor")
        if len(x) <= FEW:
            return self._few(x.contiguous(), residual.contiguous(), mode, chosen, weights)
        if chosen is None or weights is None:
            return self._many(0, x, residual, mode)
        out, counts = torch.zeros_like(x), x.new_zeros((len(x), 3), dtype=torch.int32)
        for expert in range(len(self.gate.packed)):
            token, place = (chosen == expert).nonzero(as_tuple=True)
            y, used = self._many(expert, x[token], residual[token], mode)
            out.index_add_(0, token, y * weights[token, place, None])
            counts.index_add_(0, token, used)
        return out, counts

    def _few(
        self,
        x: Tensor,
        residual: Tensor,
        mode: Mode,
        chosen: Tensor | None,
        weights: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """By kernels; nothing waits for the device."""
        offered, dense = None, mode == "dense"
        if mode == "predicted" and self.predictor:
            offered = self.predictor.lists(x, residual, chosen)
        before = offered
        if self.gated:
            before = select(
                x, self.gate, "gates", self.thresholds, chosen, before=offered, dense=dense
            )
        last = select(
            x, self.up, self.activation, self.thresholds, chosen,
            before=before, gated=self.gated, dense=dense,
        )  # fmt: skip
        positive = before if self.gated and before else last
        if self.uses is not None and not dense:
            _note(self.uses, last, chosen)
        parts = _downs(self.down, last, chosen, weights)
        return _join(parts, len(x), self.down.packed.shape[1], offered, positive, last)

    def _many(self, expert: int, x: Tensor, residual: Tensor, mode: Mode) -> tuple[Tensor, Tensor]:
        """By the reference, on rows unpacked for it; exact runs as dense, which says the same."""
        candidates = None
        if mode == "predicted" and self.predictor:
            candidates = self.predictor.candidates(expert, x, residual)
        gate, up, down = (part.unpack(expert) for part in (self.gate, self.up, self.down))
        return sparse_ffn(
            x, gate, up, down, self.activation,
            mode="dense" if mode == "exact" else mode,
            candidates=candidates, threshold=self.threshold,
        )  # fmt: skip


class Neurons(Experts):
    """The rows of one feed-forward, and its predictor, if it has one."""

    def __init__(
        self,
        rows: FFNRows,
        activation: str,
        threads: int = 1,  # noqa: ARG002
        predictor: PackedPredictor | None = None,
        threshold: float = 0.0,
    ):
        super().__init__([rows], activation, [predictor] if predictor else [], threshold)


class _LowRank:
    """See `reference.low_rank_candidates`."""

    def __init__(self, packed: Sequence[PackedPredictor], hidden: int):
        about = packed[0].about
        ranks = {len(one.tensors["fc1"]) for one in packed}
        if len(ranks) > 1:
            raise TurboSparseError(
                f"predictors of one layer have ranks {sorted(ranks)}; backend gpu needs equal "
                "ones: use --mode exact, or --backend cpu"
            )
        fc1, fc2 = (_tensor(np.stack([one.tensors[part] for one in packed])) for part in _PARTS)
        self.of_neurons = fc2
        self.fc1 = Rows(fc1, hidden, str(about.quant))
        self.fc2 = Rows(fc2, ranks.pop(), str(about.quant))
        self.pre_norm = about.input == "pre_norm"
        self.thresholds = torch.tensor([one.threshold for one in packed], device=fc1.device)

    def lists(self, x: Tensor, residual: Tensor, chosen: Tensor | None) -> Lists:
        h = self.fc1.matvec(residual if self.pre_norm else x, chosen=chosen, relu=True)
        each = None if chosen is None else chosen.reshape(-1, 1)
        return select(h, self.fc2, "candidates", self.thresholds, each)

    def candidates(self, expert: int, x: Tensor, residual: Tensor) -> Tensor:
        fc1, fc2 = self.fc1.unpack(expert), self.fc2.unpack(expert)
        h = residual if self.pre_norm else x
        return low_rank_candidates(h, fc1, fc2, float(self.thresholds[expert]))


class _Signs:
    """See `reference.sign_candidates`."""

    def __init__(self, packed: Sequence[PackedPredictor], hidden: int):
        stride = sign_bytes(hidden)
        self.of_neurons = signs = _tensor(np.stack([one.tensors["signs"] for one in packed]))
        self.hidden, self.words = hidden, stride // 4
        self.bits = signs.unflatten(-1, (-1, stride))  # [E, I, rows that decide, bytes]
        self.thresholds = [one.threshold for one in packed]
        scores = 1 - 2 * np.arange(hidden + 1) / hidden  # by the number of columns that differ
        limits = [int((scores >= threshold).sum()) - 1 for threshold in self.thresholds]
        self.limits = torch.tensor(limits, dtype=torch.int32, device=signs.device)

    def lists(self, x: Tensor, residual: Tensor, chosen: Tensor | None) -> Lists:  # noqa: ARG002
        _, count, parts, _ = self.bits.shape
        out = Lists.empty(x, count, chosen)
        words = torch.empty(len(x), self.words, dtype=torch.int32, device=x.device)
        kernels.sign_words[len(x), self.words // 16](words, x, self.hidden, self.words, 16)
        kernels.select_signs[out.neurons.shape[:2]](
            out.neurons, out.tallies, self.bits.view(torch.int32), words, chosen, self.limits,
            count, parts, 1 if chosen is None else chosen.shape[1], self.words,
            ROWS, kernels.SEGMENT,
        )  # fmt: skip
        return out

    def candidates(self, expert: int, x: Tensor, residual: Tensor) -> Tensor:  # noqa: ARG002
        parts = [negative(part, self.hidden) for part in self.bits[expert].unbind(1)]
        return sign_candidates(x, parts, self.thresholds[expert])


def _note(uses: Tensor, last: Lists, chosen: Tensor | None) -> None:
    """Count the listed neurons by their spans."""
    places = torch.arange(kernels.SEGMENT, dtype=torch.int32, device=uses.device)
    listed = places < last.tallies[0, :, :, None]
    span = torch.where(listed, last.neurons, 0) // SPAN  # what is not listed was never written
    if chosen is not None:
        span = span + chosen.reshape(-1, 1, 1) * uses.shape[1]
    uses.view(-1).index_add_(0, span.flatten(), listed.flatten().int())


def _downs(down: Rows, last: Lists, chosen: Tensor | None, weights: Tensor | None) -> Tensor:
    """Sums of down rows in shares, ``[T · K, shares, H]``."""
    total, segments, _ = last.neurons.shape
    splits = min(SPLITS, segments)
    parts = torch.empty(total, splits, down.cols, device=last.values.device)
    kernels.downs[total, triton.cdiv(down.cols, 512), splits](
        parts, down.packed, *last, chosen, weights, down._codes,
        down.packed.shape[1], segments, down.packed.stride(1),
        down.quant, down.cols, DOWN_ROWS, kernels.SEGMENT,
    )  # fmt: skip
    return parts


def _join(
    parts: Tensor, tokens: int, neurons: int, offered: Lists | None, positive: Lists, last: Lists
) -> tuple[Tensor, Tensor]:
    """Outputs ``[T, H]`` and counts ``[T, 3]``."""
    total, splits, hidden = parts.shape
    out = torch.empty(tokens, hidden, device=parts.device)
    counts = torch.empty(tokens, 3, dtype=torch.int32, device=parts.device)
    kernels.join[tokens, triton.cdiv(hidden, 256)](
        out, counts, parts, offered and offered.tallies, last.tallies, positive.tallies,
        neurons, last.neurons.shape[1], total // tokens, splits, hidden, 256, 256,
    )  # fmt: skip
    return out, counts


def _tensor(packed: NDArray[Any]) -> Tensor:
    # copied, for the map is read-only, which torch cannot express
    return torch.from_numpy(packed.copy()).to(torch.get_default_device())


@cache
def _codes(where: torch.device) -> Tensor:
    """What a nibble of q4 stands for."""
    return torch.tensor(CODES["q4"], dtype=torch.float32, device=where)


_PARTS = ("fc1", "fc2")
