"""The decoder over a packed folder, in PyTorch: the readable twin of any faster one.

Shapes: T tokens of a step, of all its sequences together, S positions in a cache, H hidden, N query
heads, K key-value heads, D head. All arithmetic is float32, the cache holds halves; the matrices
and the feed-forwards are those of `ops.reference`, or of the `kernels` of a subclass. Nothing waits
for the device within a step.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from turbosparse.base.errors import TurboSparseError
from turbosparse.engine.positions import rope, sliding_window
from turbosparse.engine.sequence import Cancelled
from turbosparse.hf import families
from turbosparse.hf.count import experts_in_use
from turbosparse.ops import Mode, reference
from turbosparse.packed.format import Packed, ffn_prefix


class Decoder:
    """A packed model, ready to run.

    Args:
        packed: an open packed folder.
        device: where weights and caches lie, and what computes.
    """

    kernels: Any = reference

    def __init__(self, packed: Packed, *, device: str | torch.device = "cpu"):
        config = packed.config
        self.config, self.device = config, torch.device(device)
        self._packed, self._tensors = packed, packed.tensors
        name = families.table(config).name
        with self.device:
            self.embedding = self._matrix(name("embedding"))
            self.layers = [Layer(self, index) for index in range(config.num_hidden_layers)]
            self.norm = self._norm("norm")
            tied = config.tie_word_embeddings
            self.head = self.embedding if tied else self._matrix(name("head"))
            self.rope = Rope(config)

    def new_cache(self, context: int) -> Cache:
        shape = self._cache_shape(context)
        return Cache(torch.empty(shape, dtype=torch.half, device=self.device))

    def cache_bytes(self, positions: int, context: int) -> int:  # noqa: ARG002
        """Memory of a cache: it is taken for the whole context at once."""
        return 2 * int(np.prod(self._cache_shape(context)))

    def _cache_shape(self, context: int) -> tuple[int, ...]:
        config = self.config
        head = families.config_head_dim(config)
        return config.num_hidden_layers, 2, config.num_key_value_heads, context, head

    def new_cancel(self) -> threading.Event:
        return threading.Event()

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
        """See `native.Decoder.step`."""
        counts = [len(new) for new in tokens]
        with self.device:
            turn = self.rope(torch.tensor(positions(counts, caches)))
            x = self.embedding.rows([token for new in tokens for token in new])
            used = []
            for layer in self.layers:
                if cancel and cancel.is_set():
                    raise Cancelled("the step was cancelled")
                x, count_of_layer = layer(x, turn, counts, caches, mode)
                used.append(count_of_layer)
            last = (torch.tensor(counts).cumsum(0) - 1) if not every else slice(None)
            logits = self.head.matmul(self.norm(x[last]))
        for count, cache in zip(counts, caches, strict=True):
            cache.length += count
        return logits.cpu().numpy(), torch.stack(used).cpu().numpy()

    def _matrix(self, name: str) -> Any:
        spec = self._packed.plan[name]
        return self.kernels.Matrix(self._tensors[name], spec.cols, spec.quant, threads=1)

    def _mixture(self, layer: int) -> Any:
        return Mixture(self, layer)

    def _neurons(self, layer: int, expert: int | None) -> Any:
        prefix = ffn_prefix(layer, expert)
        return self.kernels.Neurons(
            self._packed.ffn(prefix),
            self._packed.activation,
            threads=1,
            predictor=self._packed.predictor(prefix),
            threshold=self._packed.header.ffn.threshold,
        )

    def _norm(self, role: str, layer: int | None = None) -> Norm:
        weight, bias = self._packed.norm(role, layer)
        own = None if bias is None else torch.tensor(bias)
        return Norm(torch.tensor(weight), own, self.config.eps)

    def _vector(self, name: str) -> Tensor:
        return torch.tensor(self._tensors[name])


class Layer:
    """``x + attention(norm(x))``, then ``x + ffn(norm(x))``."""

    def __init__(self, decoder: Decoder, index: int):
        self.attention = Attention(decoder, index)
        self.input_norm = decoder._norm("attention_norm", index)
        self.post_norm = decoder._norm("ffn_norm", index)
        if families.experts(decoder.config):
            self.ffn: Any = decoder._mixture(index)
        else:
            self.ffn = decoder._neurons(index, None).forward

    def __call__(
        self, x: Tensor, turn: Rotation, counts: list[int], caches: list[Cache], mode: Mode
    ) -> tuple[Tensor, Tensor]:
        x = x + self.attention(self.input_norm(x), turn, counts, caches)
        y, used = self.ffn(self.post_norm(x), x, mode=mode)
        return x + y, used


class Attention:
    """Grouped-query attention with rotary positions and an optional sliding window."""

    def __init__(self, decoder: Decoder, index: int):
        config = decoder.config
        self.index, self.head = index, families.config_head_dim(config)
        parts = families.layer_tensors(config, index)
        self.projections = {}
        for role in "qkvo":
            bias = parts.get(f"{role}.bias")
            self.projections[role] = (
                decoder._matrix(parts[role].name),
                decoder._vector(bias.name) if bias else 0.0,
            )
        self.window = sliding_window(config, index)

    def __call__(self, x: Tensor, turn: Rotation, counts: list[int], caches: list[Cache]) -> Tensor:
        q, k, v = (
            self._project(kind, x).unflatten(1, (-1, self.head)).transpose(0, 1) for kind in "qkv"
        )
        parts = zip(*(y.split(counts, 1) for y in (turn(q), turn(k), v)), caches, strict=True)
        out = torch.cat([self._attend(*part) for part in parts])
        return self._project("o", out)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, cache: Cache) -> Tensor:
        """The attention of one sequence."""
        keys, values = cache.append(self.index, k, v)  # [K, S, D]
        mask = causal_mask(q.shape[1], keys.shape[1], self.window)
        # the extra dimension is a batch of one: grouped heads need it
        out = scaled_dot_product_attention(
            q[None], keys[None], values[None], attn_mask=mask, enable_gqa=True
        )
        return out[0].transpose(0, 1).flatten(1)

    def _project(self, kind: str, x: Tensor) -> Tensor:
        matrix, bias = self.projections[kind]
        y: Tensor = matrix.matmul(x) + bias
        return y


class Mixture:
    """Mixtral's experts: softmax over all, the top k of them renormalised (Turbo Sparse §4)."""

    def __init__(self, decoder: Decoder, index: int):
        self.router = decoder._vector(families.table(decoder.config).name("router", index))
        self.top_k = experts_in_use(decoder.config)
        self.experts = [
            decoder._neurons(index, expert) for expert in range(families.experts(decoder.config))
        ]

    def __call__(self, x: Tensor, residual: Tensor, *, mode: Mode) -> tuple[Tensor, Tensor]:
        weights, chosen = route(x @ self.router.T, self.top_k)
        # every expert reads every token, and counts where it was chosen: no shape depends on values
        out, counts = torch.zeros_like(x), x.new_zeros((len(x), 3), dtype=torch.int32)
        for index, expert in enumerate(self.experts):
            here = chosen == index  # [T, k]
            y, used = expert.forward(x, residual, mode=mode)
            out += y * (weights * here).sum(1, keepdim=True)
            counts += used * here.sum(1, keepdim=True)
        return out, counts


def route(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Weights and indices ``[T, k]`` of the experts of each token, of router logits ``[T, E]``."""
    weights, chosen = logits.softmax(-1).topk(top_k)
    return weights / weights.sum(-1, keepdim=True), chosen


class Norm:
    """LayerNorm, or without a bias RMSNorm."""

    def __init__(self, weight: Tensor, bias: Tensor | None, eps: float):
        self.weight, self.bias, self.eps = weight, bias, eps

    def __call__(self, x: Tensor) -> Tensor:
        if self.bias is not None:
            x = x - x.mean(-1, keepdim=True)
        y = self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))
        return y if self.bias is None else y + self.bias


class Rope:
    """Rotary position embedding."""

    def __init__(self, config: Any):
        frequencies, self.scale = rope(config.rope_parameters, families.config_head_dim(config))
        self.frequencies = torch.tensor(frequencies)

    def __call__(self, positions: Tensor) -> Rotation:
        angles = positions[:, None] * self.frequencies
        angles = torch.cat((angles, angles), -1)
        return Rotation(angles.cos() * self.scale, angles.sin() * self.scale)


class Rotation:
    """The turn of T positions; `cos` and `sin` are ``[T, R]``, of the R features that turn."""

    def __init__(self, cos: Tensor, sin: Tensor):
        self.cos, self.sin = cos, sin

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate ``[heads, T, D]``; the pairs are (d, d + R/2), and what is behind R stays."""
        turned, rest = x.tensor_split([self.cos.shape[-1]], -1)
        left, right = turned.chunk(2, -1)
        turned = turned * self.cos + torch.cat((-right, left), -1) * self.sin
        return torch.cat((turned, rest), -1)


class Cache:
    """Keys and values of one sequence in half precision, ``[K, context, D]`` per layer.

    The memory is taken once, so that a captured step may run on it again.
    """

    def __init__(self, store: Tensor, length: int = 0):
        self.store, self.length = store, length  # [layers, 2, K, context, D]

    @property
    def context(self) -> int:
        return self.store.shape[3]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write the T newest positions of a layer; return all."""
        end, both = self.length + keys.shape[1], self.store[layer]
        both[0, :, self.length : end], both[1, :, self.length : end] = keys, values
        return both[0, :, :end].float(), both[1, :, :end].float()

    def copy(self, length: int) -> Cache:
        return Cache(self.store.clone(), length)

    def truncate(self, length: int) -> None:
        self.length = length

    def free(self) -> None:
        """Give the memory back; the cache is then of no positions."""
        self.store, self.length = self.store.new_empty(*self.store.shape[:3], 0, 0), 0


def positions(counts: list[int], caches: list[Cache]) -> list[int]:
    """Those of the next tokens of each sequence, one after the other.

    Raises:
        TurboSparseError: a context is full.
    """
    found: list[int] = []
    for count, cache in zip(counts, caches, strict=True):
        if (end := cache.length + count) > cache.context:
            raise TurboSparseError(f"{end} tokens do not fit the context of {cache.context}")
        found += range(cache.length, end)
    return found


def causal_mask(tokens: int, positions: int, window: int | None) -> Tensor:
    """Which of S positions each of the T newest tokens may see, bool ``[T, S]``."""
    query = torch.arange(positions - tokens, positions)[:, None]
    key = torch.arange(positions)
    seen = key <= query
    return seen if window is None else seen & (key > query - window)
