"""What positions mean: rotary frequencies that are constant, and windows. Loads no torch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float32]


def rope(parameters: dict[str, Any], head: int) -> tuple[Vector, float]:
    """Frequencies, float32 ``[pairs that turn]``, and the factor on cosines and sines.

    `parameters` are the ``rope_parameters`` of a config; the formulas are those of
    transformers' ``modeling_rope_utils``.
    """
    turned = int(head * parameters.get("partial_rotary_factor", 1))
    exponents = np.arange(0, turned, 2, dtype=np.float32) / np.float32(turned)
    base = np.float32(1) / np.float32(parameters["rope_theta"]) ** exponents
    kind = parameters["rope_type"]
    if kind == "linear":
        return base / np.float32(parameters["factor"]), 1.0
    if kind == "llama3":
        return _llama3(base, parameters), 1.0
    if kind == "yarn":
        return _yarn(base, parameters), _yarn_scale(parameters)
    return base, 1.0


def _llama3(base: Vector, parameters: dict[str, Any]) -> Vector:
    """Long waves are slowed by `factor`, short ones kept, those between interpolated."""
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = parameters["original_max_position_embeddings"] * base / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    mixed: Vector = ((1 - kept) * base / parameters["factor"] + kept * base).astype(np.float32)
    return mixed


def _yarn(base: Vector, parameters: dict[str, Any]) -> Vector:
    """The same, interpolated over the index of the frequency (YaRN §3.2)."""
    size, theta = 2 * len(base), parameters["rope_theta"]
    context = parameters["original_max_position_embeddings"]

    def index(turns: float) -> float:
        return size * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = index(parameters.get("beta_fast") or 32), index(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = (np.arange(len(base)) - low) / ((high - low) or 0.001)
    kept = 1 - np.clip(ramp, 0, 1)
    mixed: Vector = ((1 - kept) * base / parameters["factor"] + kept * base).astype(np.float32)
    return mixed


def _yarn_scale(parameters: dict[str, Any]) -> float:
    """Sharpens the attention over a longer context (YaRN §3.4)."""
    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])

    def scale(of: float) -> float:
        factor = parameters["factor"]
        return 1.0 if factor <= 1 else 0.1 * of * math.log(factor) + 1.0

    over, under = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return scale(over) / scale(under) if over and under else scale(1)


def sliding_window(config: Any, layer: int) -> int | None:
    """The attention window of a layer, or None for full attention."""
    types = config.layer_types
    if types and types[layer] != "sliding_attention":
        return None
    window: int | None = config.sliding_window
    return window
