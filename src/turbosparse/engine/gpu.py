"""The decoder on a GPU: that of `model.py` with the kernels of `ops.gpu`, weights packed.

A step of up to 16 tokens, of one or of several sequences, is one function of one small tensor: the
tokens, their positions, and the caches' addresses and contexts. Nothing in it waits for the device,
so it is captured as a CUDA graph, one for each number of tokens, and replayed. A token's logits do
not depend on the other tokens of such a step. A longer step (a prompt) is that of `model.py`.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from turbosparse.base.errors import TurboSparseError
from turbosparse.base.machine import memory_available
from turbosparse.engine import model
from turbosparse.engine.model import Attention, Cache, Norm, Rotation, positions, route
from turbosparse.engine.sequence import Cancelled
from turbosparse.engine.split import Split
from turbosparse.hf import families
from turbosparse.hf.count import experts_in_use
from turbosparse.ops import Mode, gpu, gpu_attention, hybrid
from turbosparse.ops.card import card
from turbosparse.ops.gpu_attention import Where
from turbosparse.packed.format import Packed, ffn_prefix


class Decoder(model.Decoder):
    """A packed model in the memory of a GPU.

    Args:
        packed: an open packed folder.
        split: which neurons lie there; by default all.
        threads: of the C++ core, for the others.

    Raises:
        TurboSparseError: there is no GPU, or it has too little memory.
    """

    kernels = gpu

    def __init__(self, packed: Packed, *, split: Split | None = None, threads: int = 1):
        device = gpu.device()
        self.split, self.threads = split, threads
        self._split_layers: list[hybrid.Experts] = []
        self.card = card(device)
        self.graphs: dict[tuple[int, Mode], Graph] = {}
        try:
            super().__init__(packed, device=device)
        except torch.OutOfMemoryError as error:
            size = sum(tensor.nbytes for tensor in packed.tensors.values())
            raise TurboSparseError(
                f"{packed.folder}: {size / 1e9:.1f} GB of weights do not fit the memory of the GPU "
                f"({error}); pack in fewer bits, or use --gpu-memory or --backend cpu"
            ) from error
        self.placement = None
        if split and self._split_layers:
            self.placement = hybrid.Placement(self._split_layers, self.card, split.carried)

    @property
    def name(self) -> str:
        """What computes."""
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else "interpreted"
        return f"{name}, {self.split}" if self.split else name

    def memory_free(self) -> int:
        """Bytes where caches can lie."""
        return torch.cuda.mem_get_info()[0] if self.device.type == "cuda" else memory_available()

    @torch.inference_mode()
    def step(
        self,
        tokens: list[list[int]],
        caches: list[Cache],
        *,
        mode: Mode,
        every: bool = False,
        cancel: threading.Event | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """See `native.Decoder.step`; a step of few tokens cannot be cancelled once it began."""
        counts = [len(new) for new in tokens]
        if sum(counts) > gpu.FEW:
            return super().step(tokens, caches, mode=mode, every=every, cancel=cancel)
        if cancel and cancel.is_set():
            raise Cancelled("the step was cancelled")
        if self.placement:
            self.placement.follow()
        own = [cache for cache, count in zip(caches, counts, strict=True) for _ in range(count)]
        inputs = torch.tensor(
            [
                [token for new in tokens for token in new],
                positions(counts, caches),
                [cache.store.data_ptr() for cache in own],
                [cache.context for cache in own],
            ]
        )
        with self.device:
            logits, used = self._run(inputs.to(self.device), mode)
        for count, cache in zip(counts, caches, strict=True):
            cache.length += count
        found = logits.cpu().numpy()
        last = np.cumsum(counts) - 1
        return found if every else found[last], used.cpu().numpy()

    def _run(self, inputs: Tensor, mode: Mode) -> tuple[Tensor, Tensor]:
        if self.placement or self.device.type != "cuda":
            return self.few(inputs, mode)
        key = inputs.shape[1], mode
        if key not in self.graphs:
            self.graphs[key] = Graph(self, inputs, mode)
        return self.graphs[key].replay(inputs)

    def few(self, inputs: Tensor, mode: Mode) -> tuple[Tensor, Tensor]:
        """Logits ``[T, vocabulary]`` and neurons used ``[layers, T, 3]``.

        Args:
            inputs: int64 ``[4, T]``, on the device: tokens, positions, and of their caches
                addresses and contexts.
            mode: which rows of the feed-forwards are read.
        """
        tokens, places, addresses, contexts = inputs
        where, turn = Where(addresses, contexts, places), self.rope(places)
        x, used = self.embedding.rows(tokens), []
        for layer in self.layers:
            x = x + _attention(layer.attention, _norm(layer.input_norm, x), turn, where)
            y, counts = layer.ffn(_norm(layer.post_norm, x), x, mode=mode)
            x = x + y
            used.append(counts)
        return self.head.matmul(_norm(self.norm, x)), torch.stack(used)

    def _mixture(self, layer: int) -> Mixture:
        return Mixture(self, layer)

    def _neurons(self, layer: int, expert: int | None) -> Any:
        return self.experts([ffn_prefix(layer, expert)])

    def experts(self, prefixes: list[str]) -> gpu.Experts | hybrid.Experts:
        """The feed-forwards of a layer."""
        packed, split = self._packed, self.split
        rows = [packed.ffn(prefix) for prefix in prefixes]
        predictors = [found for prefix in prefixes if (found := packed.predictor(prefix))]
        activation, threshold = packed.activation, packed.header.ffn.threshold
        if split is None or split.hot == split.neurons:
            return gpu.Experts(rows, activation, predictors, threshold)
        own = hybrid.Experts(
            rows, activation, self.threads, predictors, threshold, hot=split.hot, card=self.card
        )
        self._split_layers.append(own)
        return own


class Graph:
    """A step of a number of tokens, captured; it runs again on what its inputs then hold."""

    def __init__(self, decoder: Decoder, inputs: Tensor, mode: Mode):
        self.inputs, self.graph = inputs.clone(), torch.cuda.CUDAGraph()
        decoder.few(self.inputs, mode)  # compiles kernels, which must not happen in a capture
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph):
            self.outputs = decoder.few(self.inputs, mode)

    def replay(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        self.inputs.copy_(inputs)
        self.graph.replay()
        return self.outputs


class Mixture:
    """The twin of `model.Mixture` whose tokens read the experts that they chose."""

    def __init__(self, decoder: Decoder, index: int):
        config, packed = decoder.config, decoder._packed
        router = packed.tensors[families.table(config).name("router", index)]
        self.router = gpu.Matrix(router.view(np.uint8), router.shape[1], "f32")
        self.top_k = experts_in_use(config)
        prefixes = [ffn_prefix(index, expert) for expert in range(families.experts(config))]
        self.experts = decoder.experts(prefixes)

    def __call__(self, x: Tensor, residual: Tensor, *, mode: Mode) -> tuple[Tensor, Tensor]:
        weights, chosen = route(self.router.matmul(x), self.top_k)
        return self.experts.forward(
            x, residual, mode=mode, chosen=chosen.int(), weights=weights.contiguous()
        )


def _norm(norm: Norm, x: Tensor) -> Tensor:
    return gpu_attention.norm(x, norm.weight, norm.bias, norm.eps)


def _attention(attention: Attention, x: Tensor, turn: Rotation, where: Where) -> Tensor:
    def project(kind: str, x: Tensor) -> Tensor:
        matrix, bias = attention.projections[kind]
        y: Tensor = matrix.matmul(x, bias if isinstance(bias, Tensor) else None)
        return y

    q, k, v = (project(kind, x) for kind in "qkv")
    head, layer = attention.head, attention.index
    q = gpu_attention.keep(q, k, v, turn.cos, turn.sin, where, layer, head)
    seen = gpu_attention.attend(q, where, layer, head, k.shape[1] // head, attention.window)
    return project("o", seen)
