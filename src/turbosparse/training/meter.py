"""What the log says of feed-forwards and routers: sparsity, the load of experts, entropy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from turbosparse.hf import families
from turbosparse.hf.observe import Seen, observe_ffn, observe_routers

_ZEROS, _ENTRIES, _ROUTED, _ENTROPY, _TOKENS = range(5)


class Meter:
    """Counts what `model` does in the forward passes that are watched.

    All counts are sums and stay on the model's device: nothing waits for them, and those of several
    processes add up.
    """

    def __init__(self, model: Any):
        self._model = model
        self._experts = families.experts(model.config)
        shape = (5, model.config.num_hidden_layers, max(1, self._experts))
        self._counts = torch.zeros(shape, dtype=torch.float64)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Count in the forward passes inside."""
        self._counts = self._counts.to(next(self._model.parameters()).device)

        def see_ffn(seen: Seen) -> None:
            counts = self._counts[:, seen.layer, seen.expert or 0]
            counts[_ZEROS] += seen.combined.numel() - seen.combined.count_nonzero()
            counts[_ENTRIES] += seen.combined.numel()

        def see_router(layer: int, logits: Tensor, chosen: Tensor) -> None:
            counts = self._counts[:, layer]
            counts[_ROUTED] += chosen.flatten().bincount(minlength=self._experts)
            shares = logits.double().log_softmax(-1)
            counts[_ENTROPY, 0] -= (shares.exp() * shares).sum()
            counts[_TOKENS, 0] += len(logits)

        with observe_ffn(self._model, see_ffn), observe_routers(self._model, see_router):
            yield

    def read(self, add_up: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The figures of a log line; the counts restart. `add_up` sums a tensor over processes.

        ``sparsity`` is the share of exact zeros in Combined, ``expert_load`` an expert's share of
        what the router gives out (even: 1 / experts), ``router_entropy`` is in nats.
        """
        counts = add_up(self._counts.clone()).cpu()
        self._counts.zero_()
        layers = counts[_ZEROS].sum(-1) / counts[_ENTRIES].sum(-1)
        logs = {"activation_sparsity": float(layers.mean())} | _by_layer("sparsity", layers)
        if not self._experts:
            return logs
        entropy = counts[_ENTROPY, :, 0] / counts[_TOKENS, :, 0]
        load = counts[_ROUTED] / counts[_ROUTED].sum(-1, keepdim=True)
        logs |= {"router_entropy": float(entropy.mean()), "expert_load_max": float(load.max())}
        logs |= _by_layer("router_entropy", entropy) | _by_layer("expert_load_max", load.amax(-1))
        for expert in range(self._experts):
            sparsity = counts[_ZEROS, :, expert] / counts[_ENTRIES, :, expert]
            logs |= _by_layer("expert_load", load[:, expert], f"/expert_{expert}")
            logs |= _by_layer("sparsity", sparsity, f"/expert_{expert}")
        return logs


def _by_layer(what: str, values: Tensor, suffix: str = "") -> dict[str, float]:
    """One entry for each layer; an expert that got no token has no sparsity."""
    known = {layer: value for layer, value in enumerate(values.tolist()) if value == value}
    return {f"{what}/layer_{layer:02}{suffix}": value for layer, value in known.items()}
