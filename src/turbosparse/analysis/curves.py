"""Perplexity against kept neurons: those that add little are dropped, chosen in some ways.

``top_k``: a token keeps the k entries of Combined that are largest in size, the same k in all
layers (Turbo Sparse eq. 3). ``threshold``: one number for all layers, on the size of Combined.
``cett``: with the neuron outputs n_i = Combined_i · down_i, a layer drops D = {i: ‖n_i‖ < ε}, and
CETT = ‖Σ_D n_i‖ / ‖Σ n_i‖, mean over tokens; ε is chosen for each layer so that CETT is the same
in all (ReLU² Wins, arXiv 2402.03804). Of a mixture, the sums are an expert's. ``gate``: one number
for all layers, up to which a gate counts as zero, where the activation has it cut below zero anyway
(FATReLU: ProSparse, arXiv 2402.13516); of the four only this needs no Combined to choose by.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from turbosparse.analysis.measure import batches, nats_of
from turbosparse.base.progress import track
from turbosparse.hf.activations import ACTIVATIONS
from turbosparse.hf.change import change_each, cut_gates
from turbosparse.hf.load import activation_of
from turbosparse.hf.observe import Seen, observe_ffn
from turbosparse.packed.stats import Curves, Point

KEPT = (0.7, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05)  # of the neurons that are active
CETTS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
LEVELS = 64  # values of ε for which the CETT of a layer is worked out
TOKENS = 64  # of an FFN or expert, evenly spaced, that these are worked out on
STEPS, NEAR = 12, 0.02  # of the bisection; the part of the rise that it may be off by

Where = tuple[int, int | None]  # layer, expert
# (where, Combined [N, I]) → which entries are kept
Keep = Callable[[Where, Tensor], Tensor]


def _active(_: Where, combined: Tensor) -> Tensor:
    return combined != 0


@torch.inference_mode()
def curves_of(model: Any, pieces: list[list[int]], *, rise: float = 1.0) -> Curves:
    """The curves of `model` on pieces of token ids; it runs them some 30 times.

    Args:
        rise: percent that the perplexity may rise at CETT-PPL-p %.
    """
    runs = _Runs(model.eval(), batches(pieces))
    base = runs.point(0.0, _active)
    choose = _Choices(model, runs.batches[0])
    found: dict[str, list[Point]] = {"top_k": [], "threshold": [], "cett": []}
    settings = [("cett", value) for value in CETTS]
    settings += [(name, part * base.kept) for name in ("top_k", "threshold") for part in KEPT]
    if ACTIVATIONS[activation_of(model.config)].cuts:
        found["gate"] = []
        settings += [("gate", part) for part in KEPT]
    for name, setting in track(settings, "curves", total=len(settings)):
        found[name].append(runs.point(*getattr(choose, name)(setting)))

    def risen(cett: float) -> float:
        found["cett"].append(runs.point(*choose.cett(cett)))
        return found["cett"][-1].perplexity / base.perplexity - 1

    limit = base.perplexity * (1 + rise / 100)
    below = [p.setting for p in found["cett"] if p.perplexity < limit]
    above = [p.setting for p in found["cett"] if p.perplexity >= limit]
    at = bisect(risen, rise / 100, low=max(below, default=0.0), high=min(above, default=None))
    best = None if at is None else found["cett"][-1]
    found["cett"].sort(key=lambda point: point.setting)
    return Curves(
        tokens=sum(len(piece) - 1 for piece in pieces),
        perplexity=base.perplexity,
        kept=base.kept,
        methods=found,
        rise=rise,
        cett=best,
    )


def bisect(
    f: Callable[[float], float], limit: float, *, low: float, high: float | None
) -> float | None:
    """Where the growing `f` reaches `limit`, nearly; the last value asked for.

    Without `high` it is at most 1; None if `f` is still below there.
    """
    if high is None:
        high = 1.0
        if f(high) < limit:
            return None
    for _ in range(STEPS):
        middle = (low + high) / 2
        value = f(middle)
        if abs(value - limit) <= NEAR * limit:
            break
        low, high = (middle, high) if value < limit else (low, middle)
    return middle


class _Runs:
    """Runs a model over some batches, with neurons dropped."""

    def __init__(self, model: Any, batches: list[Tensor]):
        self.model, self.batches = model, batches

    def point(self, setting: float, keep: Keep, cut: float = 0.0) -> Point:
        """Perplexity, and the share of entries that are kept and not zero; no padding counts.

        Gates up to `cut` are zero.
        """
        kept, entries, nats = 0, 0, 0.0
        for ids in self.batches:
            real = (ids[:, 1:] >= 0).flatten().to(self.model.device)

            def change(where: Where, active: Tensor, rows: Tensor, real: Tensor = real) -> Tensor:
                nonlocal kept, entries
                changed = torch.where(keep(where, active), active, 0)
                counted = changed if real.all() else changed[real[rows]]
                kept += int(counted.count_nonzero())
                entries += counted.numel()
                return changed

            inputs = ids[:, :-1].clamp(min=0).to(self.model.device)
            with cut_gates(self.model, cut), change_each(self.model, change):
                nats += nats_of(self.model(inputs, use_cache=False).logits, ids)
        tokens = sum(int((ids[:, 1:] >= 0).sum()) for ids in self.batches)
        perplexity = math.exp(min(nats / tokens, 700))
        return Point(kept=kept / entries, perplexity=perplexity, setting=setting)


class _Choices:
    """The ways to choose, with what they need to know of the model, learnt on a batch."""

    def __init__(self, model: Any, ids: Tensor):
        seen: dict[Where, list[Tensor]] = {}
        gates: list[Tensor] = []

        def see(one: Seen) -> None:
            step = -(-len(one.combined) // TOKENS)
            gate = one.gate[::step].float()
            gates.append(gate[gate > 0])
            seen.setdefault((one.layer, one.expert), []).append(one.combined[::step].float())

        short = ids[:1, :-1].clamp(min=0).to(model.device)
        with observe_ffn(model, see, apart=True):
            model(short, use_cache=False)
        some = {where: torch.cat(parts) for where, parts in seen.items()}
        self._sizes = torch.cat([part.abs().flatten() for part in some.values()]).sort().values
        self._gates = torch.cat(gates).sort().values
        self._layers = model.model.layers
        self._norms = {w: self._down(w).norm(dim=0) for w in self._places()}
        self._levels = [self._table(layer, some) for layer in range(len(self._layers))]

    def _places(self) -> Iterable[Where]:
        for layer, block in enumerate(self._layers):
            if hasattr(block.mlp, "experts"):
                yield from ((layer, expert) for expert in range(block.mlp.experts.num_experts))
            else:
                yield layer, None

    def _down(self, where: Where) -> Tensor:
        """The down projection, ``[H, I]``."""
        layer, expert = where
        mlp = self._layers[layer].mlp
        weight: Tensor = mlp.down_proj.weight if expert is None else mlp.experts.down_proj[expert]
        return weight.float()

    def _table(self, layer: int, some: dict[Where, Tensor]) -> tuple[Tensor, Tensor]:
        """Values of ε, and the layer's CETT at each."""
        mine = {where: part for where, part in some.items() if where[0] == layer}
        norms = torch.cat([(part.abs() * self._norms[w]).flatten() for w, part in mine.items()])
        above = norms[norms > 0].sort().values
        if not len(above):  # a dead layer: any ε does
            return norms.new_tensor([0.0, 1.0]), norms.new_tensor([0.0, 1.0])
        at = torch.linspace(0, 1, LEVELS, device=above.device) * (len(above) - 1)
        levels = torch.cat([above[at.long()], above[-1:] * 1.01])
        cetts = [cett(part, self._down(w), levels) for w, part in mine.items()]
        return levels, torch.cat(cetts).mean(0)

    def top_k(self, share: float) -> tuple[float, Keep]:
        def keep(_: Where, active: Tensor) -> Tensor:
            size = active.abs()
            count = max(1, round(share * size.shape[-1]))
            return size >= size.topk(count, -1).values[..., -1:]

        return share, keep

    def threshold(self, share: float) -> tuple[float, Keep]:
        """One for all layers, above which so many entries are."""
        least = float(self._sizes[-max(1, round(share * len(self._sizes)))])
        return least, lambda _, active: active.abs() >= least

    def gate(self, share: float) -> tuple[float, Keep, float]:
        """One for all layers, which this share of the positive gates is above."""
        count = max(1, round(share * len(self._gates)))
        most = float(self._gates[-count]) if len(self._gates) else 0.0
        return most, _active, most

    def cett(self, target: float) -> tuple[float, Keep]:
        """A threshold of each layer at which its CETT is `target`, between the nearest levels."""
        least = [_between(*table, target) for table in self._levels]
        norms = self._norms
        return target, lambda where, active: active.abs() * norms[where] >= least[where[0]]


def cett(combined: Tensor, down: Tensor, levels: Tensor) -> Tensor:
    """CETT of each token where the neurons with outputs smaller than a level are dropped.

    Shapes: `combined` ``[N, I]``, `down` ``[H, I]``, `levels` ``[G]``; the result ``[N, G]``.
    """
    norms = combined.abs() * down.norm(dim=0)
    whole = linear(combined, down).norm(dim=-1).clamp(min=1e-30)
    lost = [linear(combined * (norms < level), down).norm(dim=-1) for level in levels]
    ratio: Tensor = torch.stack(lost, -1) / whole[:, None]
    return ratio


def _between(levels: Tensor, cetts: Tensor, target: float) -> float:
    above = int((cetts < target).sum().clamp(1, len(cetts) - 1))
    low, high = float(cetts[above - 1]), float(cetts[above])
    part = min(1.0, max(0.0, (target - low) / max(high - low, 1e-12)))
    return float(levels[above - 1] + part * (levels[above] - levels[above - 1]))
