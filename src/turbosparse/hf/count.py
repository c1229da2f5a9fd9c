"""Activated parameters: the weights that one token needs, by a stated rule."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from turbosparse.hf import families

RULE = (
    "activated = every weight outside the FFN (attention, norms, router, LM head; of the input "
    "embedding one row) + 3 × hidden per active neuron of the experts in use; no predictor"
)


@dataclass(frozen=True)
class Parameters:
    """Parameters of a model: all of them, and those read for one token."""

    total: int
    activated: int  # Turbo Sparse's count (RULE): rows of active neurons only
    read_exact: int  # what exact mode reads: all gates, up where gate > 0, down where Combined ≠ 0


def exact_share(active: float, gate_positive: float) -> float:
    """Share of a gated FFN's weights that exact mode reads; see `count_parameters`."""
    return (1 + gate_positive + active) / 3


def count_parameters(config: Any, *, active: float = 1.0, gate_positive: float = 1.0) -> Parameters:
    """Count the parameters of a model.

    Args:
        config: config of a supported family.
        active: share of neurons whose Combined is not zero, in the experts in use; 1 for a dense
            model.
        gate_positive: share of neurons whose gate is positive, which is what exact mode goes by.
    """
    total = sum(prod(shape) for shape in families.tensor_shapes(config).values())
    per_ffn = 3 * config.hidden_size * config.intermediate_size
    outside = total - per_ffn * len(families.ffns(config))
    if not config.tie_word_embeddings:
        outside -= (config.vocab_size - 1) * config.hidden_size
    in_use = config.num_hidden_layers * (
        config.num_experts_per_tok if families.experts(config) else 1
    )
    return Parameters(
        total=total,
        activated=round(outside + in_use * per_ffn * active),
        read_exact=round(outside + in_use * per_ffn * exact_share(active, gate_positive)),
    )
