"""Feed-forwards in two places: hot spans on the card, the others on the C++ core meanwhile.

Which spans are hot follows the text: those that it uses take the place of those that it does not,
some between two steps, and they travel during the step before. Nothing depends on how long that
takes. What is computed is the same; sums are added up in another order.

Shapes: T tokens, H hidden, E experts (one in a dense model), of which a token uses K.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from turbosparse.ops import Mode, gpu, native
from turbosparse.ops.card import Arrays, Card
from turbosparse.ops.gpu import SPAN
from turbosparse.ops.predictor import PackedPredictor
from turbosparse.ops.rows import FFNRows

# Chosen, not tuned, for no card was there. A span moves if it was of late used by so much more than
# the one that it replaces; uses of a step count half after 34 further ones.
KEPT, TIMES, LEAST = 0.98, 1.25, 16.0


class Experts:
    """The feed-forwards of a layer, with the interface of `gpu.Experts`.

    Args:
        rows, activation, predictors, threshold: see `gpu.Experts`.
        threads: of the core.
        hot: neurons of each expert on the card, whole spans; at first the first ones.
        card: where they lie.
    """

    def __init__(
        self,
        rows: Sequence[FFNRows],
        activation: str,
        threads: int,
        predictors: Sequence[PackedPredictor] = (),
        threshold: float = 0.0,
        *,
        hot: int,
        card: Card,
    ):
        own: list[PackedPredictor | None] = [*predictors] if predictors else [None] * len(rows)
        self.cold = [
            native.neurons(one, activation, predictor, threshold)
            for one, predictor in zip(rows, own, strict=True)
        ]
        self.threads, self.card = threads, card
        spans, slots = -(-len(rows[0].gates) // SPAN), hot // SPAN
        self.span_of = np.tile(np.arange(slots), (len(rows), 1))  # [E, slots]
        self.on_card = np.zeros((len(rows), spans), np.uint8)
        self.on_card[:, :slots] = 1
        self.uses = np.zeros((len(rows), spans), np.int32)  # by the core
        self.sources = [
            [one.gates, one.pairs, *([predictor.of_neurons] if predictor else [])]
            for one, predictor in zip(rows, own, strict=True)
        ]
        self.hot: gpu.Experts | None = None
        if hot:
            firsts = [one[:hot] for one in rows]
            parts = [predictor.first(hot) for predictor in predictors]
            self.hot = gpu.Experts(firsts, activation, parts, threshold)

    @property
    def span_bytes(self) -> int:
        """Of all that is carried with a span."""
        return SPAN * int(sum(part.shape[1] for part in self.sources[0]))

    def forward(
        self,
        x: Tensor,
        residual: Tensor,
        *,
        mode: Mode,
        chosen: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `gpu.Experts.forward`."""
        given = [part for part in (x, residual, chosen, weights) if part is not None]
        # on its way before the card gets its work, or the core would wait for that
        fetched, hot = self.card.fetch(given), None
        if self.hot:
            work = partial(self.hot.forward, mode=mode, chosen=chosen, weights=weights)
            hot = self.card.begin(partial(work, x, residual))
        y, counts = self.card.give(self._cold(mode, *fetched()))
        if hot:
            own, used = hot()
            y, counts = y + own, counts + used
        return y, counts

    def _cold(
        self,
        mode: Mode,
        x: NDArray[np.float32],
        residual: NDArray[np.float32],
        chosen: NDArray[np.int32] | None = None,
        weights: NDArray[np.float32] | None = None,
    ) -> Arrays:
        # the card does not count the uses of a longer pass
        uses = self.uses if len(x) <= gpu.FEW else np.zeros_like(self.uses)
        out, counts = np.zeros_like(x), np.zeros((len(x), 3), np.int32)
        if chosen is None or weights is None:
            self._core(0, x, residual, mode, uses, out, counts)
            return out, counts
        for expert in np.unique(chosen).tolist():
            token, place = np.nonzero(chosen == expert)
            y, used = np.empty_like(x[token]), np.empty_like(counts[token])
            self._core(expert, x[token], residual[token], mode, uses, y, used)
            out[token] += y * weights[token, place, None]
            counts[token] += used
        return out, counts

    def _core(
        self, expert: int, x: Any, residual: Any, mode: Mode, uses: Any, out: Any, counts: Any
    ) -> None:
        where = self.on_card[expert], uses[expert]
        self.cold[expert].forward(x, residual, out, counts, mode, self.threads, *where)


class Move(NamedTuple):
    """A span of an expert of a layer that takes the place of another."""

    layer: int
    expert: int
    slot: int
    span: int


class Placement:
    """Lets the spans on the card follow the text.

    Args:
        layers: of a model, alike.
        card: of them all.
        limit: bytes that may be carried between two steps.
    """

    def __init__(self, layers: list[Experts], card: Card, limit: int):
        self.layers, self.card, self.limit = layers, card, limit
        self._under_way: tuple[list[Move], Future[list[Tensor]]] | None = None
        first, self._counted = layers[0], None
        self._lately = np.zeros((len(layers), *first.uses.shape))
        if first.hot:
            device = first.hot.parts[0].device
            shape = len(layers), *first.span_of.shape
            self._counted = torch.zeros(shape, dtype=torch.int32, device=device)
            for layer, uses in zip(layers, self._counted, strict=True):
                assert layer.hot
                layer.hot.uses = uses

    def follow(self) -> None:
        """Between two steps: put in its place what was carried, and send for more."""
        if self._counted is None:
            return
        self._count()  # by the places as they were
        self._arrive()
        if moves := self._wanted():
            rows = [part for move in moves for part in self._rows(move)]
            self._under_way = moves, self.card.carry(rows)

    def _arrive(self) -> None:
        """The neurons that were carried take their places."""
        if self._under_way is None:
            return
        (moves, carried), self._under_way = self._under_way, None
        rows = iter(carried.result())
        for move in moves:
            layer = self.layers[move.layer]
            assert layer.hot
            at = slice(move.slot * SPAN, (move.slot + 1) * SPAN)
            for part in layer.hot.parts:
                part[move.expert, at] = next(rows)
            on_card = layer.on_card[move.expert]
            on_card[layer.span_of[move.expert, move.slot]], on_card[move.span] = 0, 1
            layer.span_of[move.expert, move.slot] = move.span

    def _count(self) -> None:
        """Add what the steps since the last look used."""
        assert self._counted is not None
        self._lately *= KEPT
        counted = self._counted.to("cpu", copy=True).numpy()
        self._counted.zero_()
        for lately, layer, uses in zip(self._lately, self.layers, counted, strict=True):
            lately += layer.uses
            layer.uses[:] = 0
            np.put_along_axis(
                lately, layer.span_of, np.take_along_axis(lately, layer.span_of, 1) + uses, 1
            )

    def _wanted(self) -> list[Move]:
        """Of each expert at most one; those that gain most, as many as may be carried."""
        on_card = np.stack([layer.on_card for layer in self.layers]).astype(bool)
        first = self.layers[0]
        whole = len(first.sources[0][0]) // SPAN  # a shorter last one fits no place
        lately, on_card = self._lately[..., :whole], on_card[..., :whole]
        cold = np.where(on_card, -np.inf, lately)
        hot = np.where(on_card, lately, np.inf)
        best, worst = cold.max(-1), hot.min(-1)
        gains = np.where(best >= np.maximum(TIMES * worst, worst + LEAST), best - worst, 0)
        most = self.limit // max(layer.span_bytes for layer in self.layers)
        order = np.argsort(-gains, axis=None, kind="stable")[:most]
        moves = []
        for layer, expert in zip(*np.unravel_index(order, gains.shape), strict=True):
            if gains[layer, expert] > 0:
                span, old = cold[layer, expert].argmax(), hot[layer, expert].argmin()
                (slot,) = np.flatnonzero(self.layers[layer].span_of[expert] == old)
                moves.append(Move(int(layer), int(expert), int(slot), int(span)))
        return moves

    def _rows(self, move: Move) -> Arrays:
        at = slice(move.span * SPAN, (move.span + 1) * SPAN)
        return [part[at] for part in self.layers[move.layer].sources[move.expert]]
