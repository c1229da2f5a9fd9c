"""What a statistics file says, as plain data: what a report shows and keeps as JSON."""

from __future__ import annotations

import math
from typing import Any

import torch

from turbosparse.hf.activations import ACTIVATIONS, WITHOUT_ZEROS
from turbosparse.packed.stats import EDGES, POSITIONS, VALUES, Stats

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


def facts(stats: Stats, name: str) -> dict[str, Any]:
    """Shares are of neurons; lists over the layers, or ``[layer][expert]``."""
    activation = stats.about.get("activation", "")
    experts = stats.active.shape[1]
    share = stats.tokens / stats.tokens.sum(-1, keepdim=True).clamp(min=1)
    entropy = -(share * share.clamp(min=1e-30).log()).sum(-1)
    mean = {
        "gate": stats.gate_ratio(),
        **dict(zip(("up", "both"), stats.signs_ratio(), strict=True)),
    }
    return {
        "name": name,
        "model": stats.about.get("model", name),
        "activation": activation,
        "formula": ACTIVATIONS[activation].formula if activation in ACTIVATIONS else activation,
        "zeros": activation not in WITHOUT_ZEROS,
        "layers": len(stats.active),
        "experts": experts if experts > 1 else 0,
        "neurons": stats.active.shape[2],
        "tokens": sum(stats.predicted.values()),
        "perplexity": _finite(stats.perplexity()),
        "sparsity": stats.activation_sparsity(),
        "corpora": [
            {
                "name": corpus,
                "tokens": tokens,
                "perplexity": _finite(stats.perplexity(corpus)),
                "sparsity": stats.sparsity[corpus],
            }
            for corpus, tokens in stats.predicted.items()
        ],
        "layer_sparsity": (1 - stats.per_layer(stats.active_ratio())).tolist(),
        "expert_sparsity": (1 - stats.active_ratio()).tolist(),
        "quantiles": {
            "of the active share at": QUANTILES,
            "values": stats.quantiles(*QUANTILES).tolist(),
        },
        "positive": {which: float(stats.per_layer(ratio).mean()) for which, ratio in mean.items()},
        "positive_by_layer": {which: stats.per_layer(r).tolist() for which, r in mean.items()},
        "dead": (stats.active == 0).sum(-1).tolist(),
        "hot": _mean(stats.hot_share()),
        "hot_curve": _hot_curve(stats),
        "overlap": stats.overlap(),
        "windows": stats.together("windows"),
        "batches": stats.together("batches"),
        "positions": _positions(stats),
        "values": _values(stats),
        "near_zero": stats.near_zero,
        "expert_load": share.tolist(),
        "load_entropy": entropy.tolist(),
        "router_entropy": stats.router_entropy(),
        "words": stats.words,
        "sample": stats.sample.tolist(),
        "activity": _shades(stats),
        "curves": stats.curves.model_dump() if stats.curves else None,
    }


def _shades(stats: Stats) -> list[dict[str, float]]:
    """Of each word of the sample the mean over the layers, and where that is from least to most."""
    if not stats.words:
        return []
    mean = stats.sample.mean(0)
    shade = (mean - mean.min()) / (mean.max() - mean.min()).clamp(min=1e-9)
    return [{"active": a, "shade": s} for a, s in zip(mean.tolist(), shade.tolist(), strict=True)]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _mean(table: list[list[float]]) -> float:
    return float(torch.tensor(table).mean())


def _hot_curve(stats: Stats) -> list[float]:
    """Of all activations, the part that the hottest 0, 1, … 100 percent of the neurons make."""
    heat = stats.heat()
    places = (torch.arange(101) * heat.shape[-1] / 100).round().long()
    carried = torch.cat([torch.zeros(*heat.shape[:2], 1).double(), heat.cumsum(-1)], -1)[
        ..., places
    ]
    used = carried[..., -1] > 0
    curve: list[float] = (
        (carried[used] / carried[used][:, -1:]).mean(0).tolist() if used.any() else []
    )
    return curve


def _positions(stats: Stats) -> list[dict[str, float]]:
    """The active share at positions of the window, of those bins that hold tokens."""
    active, visits = stats.sums["positions"].sum(0).unbind(-1)
    return [
        {
            "from": 2 ** (bin - 1) if bin else 0,
            "active": float(active[bin] / visits[bin] / stats.active.shape[-1]),
        }
        for bin in range(POSITIONS)
        if visits[bin]
    ]


def _values(stats: Stats) -> dict[str, Any]:
    """The share of gate, up and Combined in each bin; `edges` lie between the bins."""
    counts = stats.sums["values"].sum(0).double()
    shares = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    return {"edges": EDGES, **dict(zip(VALUES, shares.tolist(), strict=True))}
