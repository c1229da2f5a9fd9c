"""What the forward passes of a model add to its statistics; the sums are those of `Stats`.

Shapes: a batch has B texts of T tokens; N of these B·T tokens reach an FFN of I neurons.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from turbosparse.hf import families
from turbosparse.hf.activations import WITHOUT_ZEROS
from turbosparse.hf.load import activation_of, threshold_of
from turbosparse.hf.observe import Seen, observe_ffn, observe_inputs, observe_routers
from turbosparse.packed.stats import (
    BATCHES,
    EDGES,
    NEAR,
    POSITIONS,
    SHARES,
    VALUES,
    WINDOWS,
    Stats,
)

SAMPLE_TOKENS = 96  # of the text whose tokens are shown one by one
SAMPLE_NEURONS = 64  # of an FFN at most, whose values make the histograms

Words = NDArray[np.uint64]


class Counter:
    """Adds to `stats` what the batches do that it watches; padding is left out.

    The *active set* of a token, of which windows, batches, shares and positions count, are the
    neurons whose Combined is not zero. Of an activation without exact zeros it is those above the
    last of `NEAR` of the token's largest.
    """

    def __init__(self, stats: Stats, config: Any):
        self.stats = stats
        self._threshold = threshold_of(config)
        self._zeros = activation_of(config) not in WITHOUT_ZEROS
        experts = config.num_experts_per_tok if families.experts(config) else 1
        self._in_use = config.intermediate_size * experts
        self._shown: Tensor | None = None  # the batch that the sample is of

    @contextmanager
    def watch(self, model: Any, ids: Tensor, first: int = 0) -> Iterator[None]:
        """Count in a pass over ``ids[:, :-1]``; see `begin`."""
        self.begin(ids, first)
        with (
            observe_ffn(model, self._see_ffn, apart=True),
            observe_inputs(model, self.see_input),
            observe_routers(model, self._see_router),
        ):
            yield

    def begin(self, ids: Tensor, first: int = 0) -> None:
        """What is seen next is of this batch; the layer 0 of what runs is the layer `first`.

        Args:
            ids: token ids ``[B, T + 1]``, padded with negative numbers at the end.
        """
        self._ids, self._first, self._real = ids, first, ids[:, 1:] >= 0
        if self._shown is None:
            self._shown = ids
            width = min(SAMPLE_TOKENS, int(self._real[0].sum()))
            self.stats.sample = torch.zeros(len(self.stats.active), width)

    @property
    def sample_ids(self) -> list[int]:
        """The tokens of the sample."""
        assert self._shown is not None
        shown: list[int] = self._shown[0, : self.stats.sample.shape[1]].tolist()
        return shown

    def see_input(self, kind: str, layer: int, x: Tensor) -> None:
        """Sum the squares of what a matrix reads, ``[B·T, cols]``."""
        squares = x[self._real.flatten().to(x.device)].float().square().sum(0)
        self.stats.squares[kind][self._first + layer] += squares.cpu()

    def _see_router(self, layer: int, logits: Tensor, _chosen: Tensor) -> None:
        shares = logits[self._real.flatten().to(logits.device)].double().log_softmax(-1)
        entropy = -(shares.exp() * shares).sum().cpu()
        self.stats.sums["entropy"][self._first + layer] += torch.tensor([entropy, len(shares)])

    def _see_ffn(self, seen: Seen) -> None:
        keep = self._real.flatten()[seen.rows.cpu()]
        if not keep.all():
            values = (part[keep.to(part.device)] for part in seen[2:])
            seen = Seen(seen.layer, seen.expert, *values)
        layer = self._first + seen.layer
        at, sums = (layer, seen.expert or 0), self.stats.sums
        fires, gates, ups = seen.combined != 0, seen.gate > self._threshold, seen.up > 0
        self.stats.tokens[at] += len(seen.rows)
        self.stats.active[at] += _column_sums(fires)
        self.stats.gate_positive[at] += _column_sums(gates)
        sums["signs"][at] += torch.stack([ups.count_nonzero(), (gates & ups).count_nonzero()]).cpu()
        sums["mass"][at] += seen.combined.float().square().sum(0).cpu()
        self._see_values(layer, seen)
        if not self._zeros:
            fires = self._see_near(layer, seen.combined)
        self._see_sets(at, seen.rows.cpu().numpy(), fires.cpu().numpy())

    def _see_values(self, layer: int, seen: Seen) -> None:
        step = -(-seen.gate.shape[-1] // SAMPLE_NEURONS)
        edges = torch.tensor(EDGES, device=seen.gate.device)
        for row, name in enumerate(VALUES):
            some = getattr(seen, name)[:, ::step].float().contiguous()
            bins = torch.bucketize(some, edges).flatten().bincount(minlength=len(EDGES) + 1)
            self.stats.sums["values"][layer, row] += bins.cpu()

    def _see_near(self, layer: int, combined: Tensor) -> Tensor:
        """Count what is nearly zero; the entries that are not."""
        size = combined.abs()
        largest = size.amax(-1, keepdim=True)
        near = [size < part * largest for part in NEAR]
        counts = torch.stack([below.count_nonzero() for below in near])
        self.stats.sums["near"][layer] += counts.cpu()
        return ~near[-1]

    def _see_sets(self, at: tuple[int, int], rows: NDArray[np.int64], chosen: NDArray[Any]) -> None:
        """Count active sets ``[N, I]``, as bits of words: sets that tokens share cost little."""
        layer, sums = at[0], self.stats.sums
        texts, width = self._real.shape
        packed = np.packbits(chosen, axis=-1)
        bits = np.zeros((texts * width, -(-packed.shape[1] // 8) * 8), np.uint8)
        bits[rows, : packed.shape[1]] = packed
        words: Words = bits.view(np.uint64)
        sizes = np.bitwise_count(words).sum(-1, dtype=np.int64)
        percent = sizes[rows] * (SHARES - 1) // chosen.shape[1]
        sums["shares"][at] += _bins(percent, SHARES)
        place = np.minimum(np.frexp(rows % width)[1], POSITIONS - 1)
        sums["positions"][layer, :, 0] += _bins(place, POSITIONS, sizes[rows])
        sums["positions"][layer, :, 1] += _bins(place, POSITIONS)
        if self._ids is self._shown:
            shown = torch.from_numpy(sizes[: self.stats.sample.shape[1]] / self._in_use)
            self.stats.sample[layer] += shown
        self._see_unions(layer, words.reshape(texts, width, -1))

    def _see_unions(self, layer: int, words: Words) -> None:
        real, union, before = self._real.numpy(), words, 1
        later = words[:, 1:][real[:, 1:]]
        common = later & words[:, :-1][real[:, 1:]]
        overlap = torch.tensor([_ones(common), _ones(later)])
        self.stats.sums["overlap"][layer] += overlap
        for index, size in enumerate(WINDOWS):
            if size > words.shape[1]:
                break
            union = union[:, : words.shape[1] - size + 1] | union[:, size - before :]
            before = size
            whole = union[real[:, size - 1 :]]  # padding is at the end: its last token is real
            self.stats.sums["unions"][layer, index] += _ones(whole)
        fold = words[real]
        for index, _ in enumerate(BATCHES):
            half = len(fold) // 2
            fold = fold[:half] | fold[half : 2 * half]
            self.stats.sums["batches"][layer, index] += _ones(fold)


def count_windows(stats: Stats, ids: Tensor) -> None:
    """Count, once for all layers, the windows and draws of tokens that a batch has."""
    lengths = (ids[:, 1:] >= 0).sum(-1)
    for index, size in enumerate(WINDOWS):
        stats.sums["windows"][index] += int((lengths - size + 1).clamp(min=0).sum())
    tokens = int(lengths.sum())
    for index, size in enumerate(BATCHES):
        stats.sums["draws"][index] += tokens // size


def _column_sums(flags: Tensor) -> Tensor:
    return flags.sum(0, dtype=torch.int32).cpu()  # four times as fast as with 64 bits


def _bins(which: NDArray[np.int64], count: int, weights: NDArray[np.int64] | None = None) -> Tensor:
    return torch.from_numpy(np.bincount(which, weights, count).astype(np.int64))


def _ones(words: Words) -> int:
    return int(np.bitwise_count(words).sum(dtype=np.int64))
