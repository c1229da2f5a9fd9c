"""What a cache of neurons finds, by what gives way in it, on the activity of a model of one's own.

    python benchmarks/cache_policies.py MODEL --data held_out.jsonl --hot other.jsonl

runs a sparse model folder over text and replays which neurons each token needs against caches of
some sizes, each layer with an equal share. Counted is the share of the needed neurons that was
there once the cache was full. The engine has a clock.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from turbosparse.hf import families
from turbosparse.hf.change import change_each
from turbosparse.hf.load import load_model, load_tokenizer
from turbosparse.training.readers import documents

Needed = NDArray[np.bool_]  # [tokens, neurons]


class Past(NamedTuple):
    """Of each neuron."""

    last: NDArray[Any]  # token that used it
    uses: NDArray[Any]  # so far
    then: NDArray[Any]  # [tokens, neurons]: the next token that will


# (past, token) → a value of each neuron: those with the least give way
Policy = Callable[[Past, int], NDArray[Any]]
POLICIES: dict[str, Policy] = {
    "the least recently used gives way": lambda past, _: past.last,
    "the least often used": lambda past, _: past.uses,
    "often, and recently": lambda past, token: past.uses * 0.98 ** (token - past.last),
    "known future, the most there is": lambda past, token: -past.then[token],
}
CLOCKS = (1, 3, 7, 15)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--hot", type=Path, required=True, help="text that chooses the fixed set")
    parser.add_argument("--tokens", type=int, default=768)
    parser.add_argument("--sizes", type=float, nargs="*", default=[0.05, 0.1, 0.2, 0.4])
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.model), load_tokenizer(arguments.model)
    needed = activity(model, tokenizer, arguments.data, arguments.tokens)
    before = activity(model, tokenizer, arguments.hot, arguments.tokens)
    share = np.mean([layer.mean() for layer in needed])
    title = f"{arguments.model.name}: {share:.1%} of the neurons are needed, found of these"
    shown = Table("what stays", *(f"cache {size:.0%}" for size in arguments.sizes), title=title)
    for name, policy in POLICIES.items():
        found = [mean(replay(layer, size, policy) for layer in needed) for size in arguments.sizes]
        shown.add_row(name, *(f"{part:.1%}" for part in found))
    for most in CLOCKS:
        found = [mean(clock(layer, size, most) for layer in needed) for size in arguments.sizes]
        shown.add_row(f"clock, up to {most}", *(f"{part:.1%}" for part in found))
    found = [
        mean(fixed(layer, other, size) for layer, other in zip(needed, before, strict=True))
        for size in arguments.sizes
    ]
    shown.add_row("fixed: hot on another text", *(f"{part:.1%}" for part in found))
    Console(width=120).print(shown)


def mean(parts: Iterator[float]) -> float:
    return float(np.mean(list(parts)))


@torch.no_grad()
def activity(model: Any, tokenizer: Any, data: Path, tokens: int) -> list[Needed]:
    """Of each layer, those of all experts side by side."""
    neurons, experts = model.config.intermediate_size, max(1, families.experts(model.config))
    layers = model.config.num_hidden_layers
    seen = [np.zeros((tokens, experts * neurons), bool) for _ in range(layers)]
    ids: list[int] = []
    for document in documents(data):
        ids += tokenizer.encode(document)
        if len(ids) >= tokens:
            break

    def note(of: tuple[int, int | None], combined: Tensor, rows: Tensor) -> Tensor:
        layer, expert = of
        at = (expert or 0) * neurons
        seen[layer][rows.numpy(), at : at + neurons] = (combined != 0).numpy()
        return combined

    with change_each(model, note):
        model(torch.tensor([ids[:tokens]]))
    return seen


def replay(needed: Needed, size: float, policy: Policy) -> float:
    """The share of the needed neurons that is found, after the cache was full."""
    neurons = needed.shape[1]
    room, there = int(size * neurons), np.zeros(neurons, bool)
    past = Past(np.full(neurons, -1), np.zeros(neurons), next_uses(needed))
    found = wanted = 0
    full = False
    for token, active in enumerate(needed):
        if full:
            found, wanted = found + int((there & active).sum()), wanted + int(active.sum())
        past.last[active] = token
        past.uses[active] += 1
        there |= active
        if (over := int(there.sum()) - room) > 0:
            full = True
            held = np.nonzero(there)[0]
            value = policy(past, token)[held].astype(float)
            there[held[np.argpartition(value, over - 1)[:over]]] = False
    return found / max(1, wanted)


def clock(needed: Needed, size: float, most: int) -> float:
    """As `replay`: uses count up to `most`; the hand takes one off, and passes what has some."""
    neurons = needed.shape[1]
    room = int(size * neurons)
    frame_of, held = np.full(neurons, -1), np.full(room, -1)
    counts, hand = np.zeros(room, int), 0
    found = wanted = 0
    for active in needed:
        asked = np.nonzero(active)[0]
        there = frame_of[asked] >= 0
        frames = frame_of[asked[there]]
        counts[frames] = np.minimum(counts[frames] + 1, most)
        if held[-1] >= 0:
            found, wanted = found + int(there.sum()), wanted + len(asked)
        for neuron in asked[~there]:
            while held[hand] >= 0 and counts[hand] > 0:
                counts[hand] -= 1
                hand = (hand + 1) % room
            if held[hand] >= 0:
                frame_of[held[hand]] = -1
            held[hand], counts[hand], frame_of[neuron] = neuron, 1, hand
            hand = (hand + 1) % room
    return found / max(1, wanted)


def next_uses(needed: Needed) -> NDArray[Any]:
    """``[tokens, neurons]``: the token after this one that needs a neuron next."""
    then = np.full(needed.shape, len(needed))
    for token in range(len(needed) - 2, -1, -1):
        then[token] = np.where(needed[token + 1], token + 1, then[token + 1])
    return then


def fixed(needed: Needed, before: Needed, size: float) -> float:
    room = int(size * needed.shape[1])
    hot = np.argsort(-before.sum(0), kind="stable")[:room]
    return float(needed[:, hot].sum() / max(1, needed.sum()))


if __name__ == "__main__":
    main()
