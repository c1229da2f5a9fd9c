"""What one decoding step has to read: the byte model behind `bench`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from turbosparse.hf import families
from turbosparse.hf.count import Use, experts_in_use
from turbosparse.ops.cost import bytes_of, needed

CHUNK = 512  # tokens of a sequence that one pass reads

if TYPE_CHECKING:
    from turbosparse.engine.engine import Engine


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
    weigh = bytes_of(dict(header.quant), predictor)
    return needed(config, weigh, engine.mode, use, predictor) | {
        "keys and values": batch * positions * kept_bytes(config)
    }


def kept_bytes(config: Any) -> int:
    """Bytes of one position in the key-value cache, in half precision."""
    head = families.config_head_dim(config)
    return int(2 * 2 * config.num_key_value_heads * head * config.num_hidden_layers)
