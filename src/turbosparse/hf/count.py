"""What one token needs of a model, by part and by a stated rule. Loads no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

from turbosparse.hf import families
from turbosparse.hf.activations import ACTIVATIONS
from turbosparse.hf.load import activation_of

RULE = (
    "activated = every weight outside the FFN (attention, norms, router, LM head; of the input "
    "embedding one row) + 3 × hidden (2 × without a gate) per active neuron of the experts in use; "
    "no predictor"
)
# what the rows of a matrix cost, by its role, their number and their length: weights, bytes, FLOPs
Weigh = Callable[[str, int, int], float]
# by which share each mode reads the first matrix of a feed-forward, its ups and its downs; `oracle`
# knows which neurons will be active
_READS = {
    "dense": {"gates": "every", "ups": "every", "downs": "every"},
    "exact": {"gates": "every", "ups": "gate_positive", "downs": "active"},
    "predicted": {"gates": "candidates", "ups": "gate_positive", "downs": "active"},
    "oracle": {"gates": "active", "ups": "active", "downs": "active"},
}
_PARTS = dict.fromkeys(families.ATTENTION_ROLES, "attention") | {"head": "head"}


class Use(NamedTuple):
    """Shares of all neurons of a model, those of every expert, that one pass needs."""

    every: float  # in experts in use
    candidates: float  # that a predictor lets through
    gate_positive: float  # and with a positive gate
    active: float  # and with a Combined that is not zero


@dataclass(frozen=True)
class Parameters:
    """Parameters of a model: all of them, and those read for one token."""

    total: int
    activated: int  # Turbo Sparse's count (RULE): rows of active neurons only
    read_exact: int  # what exact mode reads: all gates, up where gate > 0, down where Combined ≠ 0


def experts_in_use(config: Any) -> int:
    return int(config.num_experts_per_tok) if families.experts(config) else 1


def neurons(config: Any) -> int:
    """All neurons of a model, those of every expert."""
    return int(len(families.ffns(config)) * config.intermediate_size)


def by_part(config: Any, weigh: Weigh, mode: str, use: Use) -> dict[str, float]:
    """What a pass needs of a model, without a predictor.

    Args:
        config: config of a supported family.
        weigh: what rows cost. A tied embedding is a `head` where it is multiplied.
        mode: dense, exact, predicted, or oracle for the rows of active neurons only.
        use: of the pass.
    """
    parts = dict.fromkeys(
        ("embedding", "attention", "norms and router", "gates", "ups", "downs", "head"), 0.0
    )
    for tensor in families.tensors(config):
        if tensor.row.packed != "ffn" and tensor.role != "embedding":
            *rows, cols = tensor.shape
            part = _PARTS.get(tensor.role, "norms and router")
            parts[part] += weigh(tensor.role, prod(rows), cols)
    hidden = config.hidden_size
    parts["embedding"] = weigh("embedding", 1, hidden)
    if config.tie_word_embeddings:
        parts["head"] = weigh("head", config.vocab_size, hidden)
    record = ACTIVATIONS[activation_of(config)]
    places = ("gates", "ups", "downs") if record.gated else ("gates", "downs")  # up is its own gate
    for place, role in zip(places, record.parts, strict=True):
        share = getattr(use, _READS[mode][place])
        parts[place] = weigh(role, neurons(config), hidden) * share
    return parts


def count_parameters(config: Any, *, active: float = 1.0, gate_positive: float = 1.0) -> Parameters:
    """Count the parameters of a model.

    Args:
        config: config of a supported family.
        active: share of neurons whose Combined is not zero, in the experts in use; 1 for a dense
            model.
        gate_positive: share of neurons whose gate is positive, which is what exact mode goes by.
    """
    every = experts_in_use(config) / (families.experts(config) or 1)
    use = Use(every, every, every * gate_positive, every * active)
    activated, read = (by_part(config, weights, mode, use) for mode in ("oracle", "exact"))
    return Parameters(
        total=sum(prod(tensor.shape) for tensor in families.tensors(config)),
        activated=round(sum(activated.values())),
        read_exact=round(sum(read.values())),
    )


def weights(_: str, rows: int, cols: int) -> float:
    """As a `Weigh`: the parameters."""
    return rows * cols
