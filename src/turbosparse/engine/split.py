"""What lies on a card under a limit, and what in the memory of the processor beside it."""

from __future__ import annotations

from dataclasses import dataclass

from turbosparse import _core
from turbosparse.base.errors import TurboSparseError
from turbosparse.base.machine import size_text
from turbosparse.engine.cost import kept_bytes
from turbosparse.hf import families
from turbosparse.packed.format import Packed, ffn_prefix

# Chosen, not tuned: what a link of 16 GB/s carries in a quarter of a millisecond.
CARRIED = 4 << 20


@dataclass(frozen=True)
class Split:
    """What lies on the card; all but `hot` and `neurons` are bytes."""

    memory: int
    keys_values: int
    rest: int  # of the weights, all that belongs to no neuron
    carried: int  # of other neurons, between two steps at most
    hot: int  # neurons of each feed-forward
    neurons: int

    def __str__(self) -> str:
        return f"{size_text(self.memory)} of the card, {self.hot} of {self.neurons} neurons on it"


def split(packed: Packed, memory: int, kv_bytes: int | None = None) -> Split:
    """Divide the memory of the card: what is no neuron's, keys and values, then hot neurons.

    Raises:
        TurboSparseError: it is too little.
    """
    config = packed.config
    neurons = config.intermediate_size
    roles = "gate", "pairs", "bundles", "neuron_order"
    rest = sum(
        t.nbytes for name, t in packed.tensors.items() if packed.plan[name].role not in roles
    )
    every = 0  # bytes of a neuron of every feed-forward
    for slot in families.ffns(config):
        rows, predictor = packed.ffn(ffn_prefix(*slot)), packed.predictor(ffn_prefix(*slot))
        every += rows.gates.shape[1] + rows.pairs.shape[1]
        if predictor:
            every += predictor.of_neurons.shape[1]
            rest -= predictor.of_neurons.nbytes
    keys_values = kv_bytes or kept_bytes(config) * min(4096, config.context)
    # a prompt unpacks one feed-forward, or a part of it, to float32
    unpacked = 4 * 3 * config.hidden_size
    left = memory - rest - keys_values
    if left < 0:
        raise TurboSparseError(
            f"--gpu-memory {size_text(memory)} is too little for {packed.folder}: without its "
            f"neurons it takes {size_text(rest)}, keys and values {size_text(keys_values)}; give "
            "more, or use --backend cpu"
        )
    if left >= neurons * (every + unpacked):
        return Split(memory, keys_values, rest, 0, neurons, neurons)
    carried = min(CARRIED, left // 64)
    span = _core.Neurons.SPAN
    hot = (left - carried) // (every + unpacked) // span * span
    return Split(memory, keys_values, rest, carried, hot, neurons)
