"""Activated parameters: the weights that one token needs, by a stated rule."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from turbosparse.hf import families
from turbosparse.hf.activations import ACTIVATIONS
from turbosparse.hf.load import activation_of

RULE = (
    "activated = every weight outside the FFN (attention, norms, router, LM head; of the input "
    "embedding one row) + 3 × hidden (2 × without a gate) per active neuron of the experts in use; "
    "no predictor"
)


@dataclass(frozen=True)
class Parameters:
    """Parameters of a model: all of them, and those read for one token."""

    total: int
    activated: int  # Turbo Sparse's count (RULE): rows of active neurons only
    read_exact: int  # what exact mode reads: all gates, up where gate > 0, down where Combined ≠ 0


def exact_matrices(activation: str, active: float, gate_positive: float) -> float:
    """Matrices' worth of an FFN that exact mode reads, of the three, or ungated two, that it has.

    All of the first; see `count_parameters`.
    """
    return 1 + ACTIVATIONS[activation].gated * gate_positive + active


def count_parameters(config: Any, *, active: float = 1.0, gate_positive: float = 1.0) -> Parameters:
    """Count the parameters of a model.

    Args:
        config: config of a supported family.
        active: share of neurons whose Combined is not zero, in the experts in use; 1 for a dense
            model.
        gate_positive: share of neurons whose gate is positive, which is what exact mode goes by.
    """
    shapes = [(tensor.row.packed, prod(tensor.shape)) for tensor in families.tensors(config)]
    total = sum(size for _, size in shapes)
    outside = sum(size for packed, size in shapes if packed != "ffn")
    if not config.tie_word_embeddings:
        outside -= (config.vocab_size - 1) * config.hidden_size
    experts = config.num_experts_per_tok if families.experts(config) else 1
    matrix = config.num_hidden_layers * experts * config.hidden_size * config.intermediate_size
    activation = activation_of(config)
    needed = len(ACTIVATIONS[activation].parts) * active
    return Parameters(
        total=total,
        activated=round(outside + matrix * needed),
        read_exact=round(outside + matrix * exact_matrices(activation, active, gate_positive)),
    )
