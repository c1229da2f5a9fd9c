"""What one decoding step has to read: the byte model behind `bench` and every plan."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from turbosparse.hf import families
from turbosparse.ops.rows import row_bytes
from turbosparse.packed.format import Packed

if TYPE_CHECKING:
    from turbosparse.engine.engine import Engine


def experts_in_use(config: Any) -> int:
    return int(config.num_experts_per_tok) if families.experts(config) else 1


def bytes_per_step(engine: Engine, counts: NDArray[np.int32], positions: float) -> dict[str, float]:
    """Bytes that a step of B sequences has to read, by part.

    Args:
        engine: the model and its mode.
        counts: candidates, neurons with positive gate and active ones, ``[steps, layers, B, 3]``.
        positions: in each sequence's cache, on average.

    A row that several sequences need is counted once. How far their neurons overlap is not
    measured: the count takes them as independent, 1 − Π (1 − share) of the rows. Nor is it counted
    how many rows pass the gate's sign bits: it takes gate and up to pass independently and alike.
    """
    config, plan = engine.config, engine.packed.plan
    batch, experts = counts.shape[2], families.experts(config) or 1
    # the share of all rows of a layer, of all its experts, that one sequence needs
    share = counts / (config.intermediate_size * experts)
    candidate, gate, active = (1 - (1 - share).prod(axis=2).mean((0, 1))).tolist()
    every = 1 - (1 - experts_in_use(config) / experts) ** batch
    neurons = config.intermediate_size * experts * config.num_hidden_layers
    quants = engine.packed.header.ffn_quants
    gates, *ups, downs = (neurons * row_bytes(quant, config.hidden_size) for quant in quants)
    if engine.mode == "dense":
        gate = active = every
    head = families.config_head_dim(config)
    kept = 2 * 2 * config.num_key_value_heads * head * config.num_hidden_layers
    by_role = dict[str, int]()
    for spec in plan.values():
        by_role[spec.role] = by_role.get(spec.role, 0) + spec.nbytes
    predictors = 0.0
    if engine.mode == "predicted":
        predictors = (
            by_role["predictor"] * every * _share_of_predictor(engine.packed, candidate / every)
        )
    return {
        "attention": sum(by_role.get(role, 0) for role in families.ATTENTION_ROLES),
        "head": by_role["embedding" if config.tie_word_embeddings else "head"],
        "predictors": predictors,
        "gates": gates * candidate,
        "ups": sum(ups) * gate,  # an ungated feed-forward has them for gates
        "downs": downs * active,
        "keys and values": batch * positions * kept,
    }


def _share_of_predictor(packed: Packed, candidates: float) -> float:
    """How much of a predictor one pass reads: of dReLU's sign bits the up's half only in part."""
    predictor = packed.header.ffn.predictor
    if predictor is None or predictor.kind == "low_rank" or packed.activation != "drelu":
        return 1.0
    return (1 + math.sqrt(candidates)) / 2
