"""What lies on a card under a limit, what on the processor beside it, and how fast that can be."""

from __future__ import annotations

from dataclasses import dataclass

from turbosparse import _core
from turbosparse.base.errors import TurboSparseError
from turbosparse.base.machine import size_text
from turbosparse.engine.cost import kept_bytes
from turbosparse.engine.expect import token_bytes
from turbosparse.hf import families
from turbosparse.ops import Mode
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


@dataclass(frozen=True)
class Expected:
    """What a token of a split model takes, at least."""

    mode: Mode
    card_bytes: float
    card_seconds: float
    memory_bytes: float
    memory_seconds: float
    link_seconds: float
    seconds: float  # of all: where both work at once, the longer one

    @property
    def tokens_per_second(self) -> float:
        return 1 / self.seconds


def expect(
    packed: Packed,
    where: Split,
    mode: Mode,
    shares: tuple[float, float, float],
    *,
    card: float,
    link: float,
    memory: float,
) -> Expected:
    """What a token takes by the bytes that must move; neither launches nor latencies are in it.

    Args:
        packed: the model.
        where: the split.
        mode: not auto.
        shares: candidates, with positive gate and active, of the neurons in use. Those on the card
            are taken to be used like the others, which is the least that a placement gives.
        card, link, memory: bytes in a second.
    """
    config, (use, parts) = packed.config, token_bytes(packed, mode, shares)
    neurons = sum(parts[name] for name in ("gates", "ups", "downs", "predictors"))
    rest = sum(parts.values()) - neurons
    both = 0.0  # what card and core read, each for its neurons: the predictors' first matrices
    if mode == "predicted":
        first = [t.nbytes for name, t in packed.tensors.items() if name.endswith("predictor.fc1")]
        both = use.every * sum(first)
    hot = where.hot / where.neurons
    on_card = (neurons - both) * hot + both * (hot > 0)
    on_core = (neurons - both) * (1 - hot) + both * (hot < 1)
    # x and its residual go, and what the core adds up comes back
    sent = 4 * 3 * config.hidden_size * config.num_hidden_layers * (hot < 1)
    beside = max(on_card / card, on_core / memory + sent / link)
    return Expected(
        mode,
        rest + on_card,
        (rest + on_card) / card,
        on_core,
        on_core / memory,
        sent / link,
        rest / card + beside,
    )
