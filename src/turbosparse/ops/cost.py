"""What a pass needs of the packed matrices of a model, in bytes or FLOPs, by part."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from turbosparse.hf.activations import ACTIVATIONS
from turbosparse.hf.count import Use, Weigh, by_part, neurons
from turbosparse.hf.load import activation_of
from turbosparse.ops.predictor import Predictor
from turbosparse.ops.rows import BLOCK, row_bytes, sign_bytes

_FLOAT = 4  # bytes of what is not quantised: norms, biases, routers


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


def bytes_of(quants: Mapping[str, str], predictor: Predictor | None = None) -> Weigh:
    """As a `Weigh`: bytes of packed rows, whose quantisation is named by role."""
    kinds = dict(quants)
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
