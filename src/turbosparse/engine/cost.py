"""What one decoding step has to read: the byte model behind `bench`, `count` and every plan."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from turbosparse.hf import families
from turbosparse.hf.activations import ACTIVATIONS
from turbosparse.hf.count import Use, Weigh, by_part, experts_in_use, neurons
from turbosparse.hf.load import activation_of
from turbosparse.ops.predictor import Predictor
from turbosparse.ops.rows import BLOCK, row_bytes, sign_bytes
from turbosparse.packed.header import QuantMap

if TYPE_CHECKING:
    from turbosparse.engine.engine import Engine

_FLOAT = 4  # bytes of what is not quantised: norms, biases, routers


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
    config, header = engine.config, engine.packed.header
    batch, experts = counts.shape[2], families.experts(config) or 1
    # the share of all rows of a layer, of all its experts, that one sequence needs
    share = counts / (config.intermediate_size * experts)
    every = 1 - (1 - experts_in_use(config) / experts) ** batch
    use = Use(every, *(1 - (1 - share).prod(axis=2).mean((0, 1))).tolist())
    predictor = header.ffn.predictor
    weigh = bytes_of(header.quant, predictor)
    return needed(config, weigh, engine.mode, use, predictor) | {
        "keys and values": batch * positions * kept_bytes(config)
    }


def kept_bytes(config: Any) -> int:
    """Bytes of one position in the key-value cache, in half precision."""
    head = families.config_head_dim(config)
    return int(2 * 2 * config.num_key_value_heads * head * config.num_hidden_layers)


def needed(
    config: Any, weigh: Weigh, mode: str, use: Use, predictor: Predictor | None
) -> dict[str, float]:
    """What a pass needs of a model, as `by_part`, with the predictor of predicted mode."""
    parts = by_part(config, weigh, mode, use)
    read = predictor if mode == "predicted" else None
    parts["predictors"] = _predictors(config, weigh, use, read) if read else 0.0
    return parts


def _predictors(config: Any, weigh: Weigh, use: Use, predictor: Predictor) -> float:
    """Those of the experts in use: of dReLU's sign bits the up's half only in part."""
    activation, hidden = activation_of(config), config.hidden_size
    if predictor.ranks is None:
        bits = weigh("signs", neurons(config) * len(ACTIVATIONS[activation].zero_by), hidden)
        passing = math.sqrt(use.candidates / use.every)
        return bits * use.every * ((1 + passing) / 2 if activation == "drelu" else 1.0)
    ranks = [rank for layer in predictor.ranks for rank in layer]
    first = weigh("predictor", sum(ranks), hidden)
    return use.every * (
        first + sum(weigh("predictor", config.intermediate_size, rank) for rank in ranks)
    )


def bytes_of(quants: QuantMap, predictor: Predictor | None = None) -> Weigh:
    """As a `Weigh`: bytes of packed rows."""
    kinds: dict[str, str] = dict(quants)
    if predictor and predictor.quant:
        kinds["predictor"] = predictor.quant

    def weigh(role: str, rows: int, cols: int) -> float:
        if role == "signs":
            return rows * sign_bytes(cols)
        if role not in kinds:
            return _FLOAT * rows * cols
        quant = kinds[role]
        width = cols if quant == "f16" else -(-cols // BLOCK) * BLOCK  # of a mean rank
        return rows * row_bytes(quant, width)

    return weigh


def flops(role: str, rows: int, cols: int) -> float:
    """As a `Weigh`: a multiplication and an addition for each weight of a matrix.

    Not of an embedding, which is looked up, nor of a sign predictor, which compares bits.
    """
    looked_up = role in ("embedding", "signs") or "norm" in role or role.endswith(".bias")
    return 0 if looked_up else 2 * rows * cols
