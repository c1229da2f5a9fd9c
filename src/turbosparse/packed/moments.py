"""How the inputs of a model's matrices correlate on a text: what rounding with feedback needs.

One layer is in memory at a time, with the moments of its inputs. The largest are down's,
``[neurons, neurons]``: of a 7B model 0.8 GB, and while its errors are passed on 3.5 GB in all.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from turbosparse.hf.layerwise import Layerwise
from turbosparse.hf.observe import Seen, observe_ffn, observe_inputs
from turbosparse.ops.feedback import Feedback
from turbosparse.ops.rows import BLOCK
from turbosparse.packed.stats import READS

Key = tuple[str, int | None]  # what reads it, and the expert whose down projection it is
_NORMED = ("qkv", "ffn")


class Moments:
    """The feedback for each matrix, layer by layer.

    Args:
        model: the checkpoint.
        ids: token ids of text, ``[N, T]``.
    """

    def __init__(self, model: Layerwise, ids: Tensor):
        self._layers = _layers(model, ids)
        self._layer, self._sums = -1, dict[Key, Tensor]()
        self._made: dict[Key, Feedback] = {}

    def feedback(self, role: str, layer: int, expert: int | None) -> Feedback | None:
        """Of the matrix at this place; None if no token came to it. Ask in the order of layers."""
        while self._layer < layer:
            self._made.clear()
            self._sums.clear()
            self._layer, self._sums = self._layer + 1, next(self._layers)
        down = role == "down"
        key = ("down", expert) if down else (READS[role], None)
        if key in self._sums:
            self._made[key] = Feedback(self._sums.pop(key), 1 if down else BLOCK)
        return self._made.get(key)


@torch.no_grad()
def _layers(model: Layerwise, ids: Tensor) -> Iterator[dict[Key, Tensor]]:
    """Of each layer the products of what its matrices read, summed, ``[cols, cols]``."""
    hidden = model.embed(ids)
    for index in range(model.config.num_hidden_layers):
        shell, sums = model.layer(index), dict[Key, Tensor]()
        for part in model.chunks(hidden):
            _add(sums, model, shell, part)
        del shell
        yield {key: moments.cpu() for key, moments in sums.items()}


def _add(sums: dict[Key, Tensor], model: Layerwise, shell: Any, hidden: Tensor) -> None:
    """Put some sequences through a layer and add what its matrices read.

    Of what a norm gives, the first token of a sequence counts as much as all others together: all
    attend to it, and it is like no other.
    """
    met: list[tuple[Key, Tensor, Tensor | slice]] = []

    def combined(seen: Seen) -> None:
        met.append((("down", seen.expert), seen.combined, seen.rows))

    def read(kind: str, _: int, x: Tensor) -> None:
        met.append(((kind, None), x, slice(None)))

    layer = SimpleNamespace(model=shell, config=model.config)
    with observe_ffn(layer, combined), observe_inputs(layer, read):
        hidden.copy_(model.run(shell, hidden))
    first = torch.ones(hidden.shape[:2], device=model.device)
    first[:, 0] = hidden.shape[1] ** 0.5
    for key, x, rows in met:
        x = x.float() * first.flatten()[rows, None] if key[0] in _NORMED else x.float()
        sums.setdefault(key, x.new_zeros(x.shape[1], x.shape[1])).addmm_(x.T, x)
