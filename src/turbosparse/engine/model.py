"""The decoder over a packed folder, in PyTorch: the readable twin of any faster one.

Shapes: T tokens of one sequence, S positions in the cache, H hidden, N query heads, K key-value
heads, D head. All arithmetic is float32, the cache holds halves; the matrices and the
feed-forwards are those of a backend (`turbosparse.ops`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from turbosparse import ops
from turbosparse.base.errors import TurboSparseError
from turbosparse.hf import families
from turbosparse.ops import Mode
from turbosparse.packed.format import Packed, ffn_prefix

# RoPE whose frequencies do not change with the length of the text
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class Decoder:
    """A packed model, ready to run: call it with tokens and a cache.

    Args:
        packed: an open packed folder.
        backend: kernels to run on, one of `ops.BACKENDS`.
        threads: of the C++ core.

    Raises:
        TurboSparseError: a RoPE variant that is not supported.
    """

    def __init__(self, packed: Packed, *, backend: str, threads: int):
        config = packed.config
        self.config = config
        self._packed, self._tensors = packed, packed.tensors
        self._threads, self._kernels = threads, ops.backend(backend)
        name = families.table(config).name
        self.embedding = self._matrix(name("embedding"))
        self.layers = [Layer(self, index) for index in range(config.num_hidden_layers)]
        self.norm = self._norm(name("norm"))
        tied = config.tie_word_embeddings
        self.head = self.embedding if tied else self._matrix(name("head"))
        self.rope = Rope(config)

    def new_cache(self, context: int) -> Cache:
        return Cache(self.config, context)

    @torch.inference_mode()
    def __call__(
        self, tokens: list[int], cache: Cache, *, mode: Mode, every: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Read `tokens` after what the cache holds.

        Args:
            tokens: T token ids; they are appended to `cache`.
            mode: which rows of the feed-forwards are read.
            every: return logits of every token, not only of the last.

        Returns:
            Logits, float32 ``[T or 1, vocabulary]``, and the neurons used, int32
            ``[layers, T, 3]``: candidates, with positive gate, and active (summed over a token's
            experts).
        """
        rope = self.rope(cache.length, len(tokens))
        x = self.embedding.rows(tokens)
        counts = []
        for layer in self.layers:
            x, count = layer(x, rope, cache, mode)
            counts.append(count)
        cache.length += len(tokens)
        return self.head.matmul(self.norm(x if every else x[-1:])), torch.stack(counts)

    def _matrix(self, name: str) -> Any:
        spec = self._packed.plan[name]
        return self._kernels.Matrix(self._tensors[name], spec.cols, spec.quant, self._threads)

    def _neurons(self, layer: int, expert: int | None) -> Any:
        prefix = ffn_prefix(layer, expert)
        return self._kernels.Neurons(
            self._packed.ffn(prefix),
            self._packed.activation,
            self._threads,
            self._packed.predictor(prefix),
        )

    def _norm(self, name: str) -> Norm:
        return Norm(torch.tensor(self._tensors[name]), self.config.rms_norm_eps)

    def _vector(self, name: str) -> Tensor:
        return torch.tensor(self._tensors[name])


class Layer:
    """``x + attention(norm(x))``, then ``x + ffn(norm(x))``."""

    def __init__(self, decoder: Decoder, index: int):
        parts = families.layer_tensors(decoder.config, index)
        self.attention = Attention(decoder, index)
        self.input_norm = decoder._norm(parts["attention_norm"].name)
        self.post_norm = decoder._norm(parts["ffn_norm"].name)
        if families.experts(decoder.config):
            self.ffn: Any = Mixture(decoder, index)
        else:
            self.ffn = decoder._neurons(index, None).forward

    def __call__(
        self, x: Tensor, rope: Rotation, cache: Cache, mode: Mode
    ) -> tuple[Tensor, Tensor]:
        x = x + self.attention(self.input_norm(x), rope, cache)
        y, counts = self.ffn(self.post_norm(x), x, mode=mode)
        return x + y, counts


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

    def __call__(self, x: Tensor, rope: Rotation, cache: Cache) -> Tensor:
        q, k, v = (
            self._project(kind, x).unflatten(1, (-1, self.head)).transpose(0, 1) for kind in "qkv"
        )
        keys, values = cache.append(self.index, rope.turn(k), v)  # [K, S, D]
        mask = causal_mask(len(x), keys.shape[1], self.window)
        # the extra dimension is a batch of one: grouped heads need it
        out = scaled_dot_product_attention(
            rope.turn(q)[None], keys[None], values[None], attn_mask=mask, enable_gqa=True
        )
        return self._project("o", out[0].transpose(0, 1).flatten(1))

    def _project(self, kind: str, x: Tensor) -> Tensor:
        matrix, bias = self.projections[kind]
        y: Tensor = matrix.matmul(x) + bias
        return y


class Mixture:
    """Mixtral's experts: softmax over all, the top k of them renormalised (Turbo Sparse §4)."""

    def __init__(self, decoder: Decoder, index: int):
        self.router = decoder._vector(families.table(decoder.config).name("router", index))
        self.top_k = decoder.config.num_experts_per_tok
        self.experts = [
            decoder._neurons(index, expert) for expert in range(families.experts(decoder.config))
        ]

    def __call__(self, x: Tensor, residual: Tensor, *, mode: Mode) -> tuple[Tensor, Tensor]:
        weights, chosen = (x @ self.router.T).softmax(-1).topk(self.top_k)
        weights = weights / weights.sum(-1, keepdim=True)
        out, counts = torch.zeros_like(x), torch.zeros((len(x), 3), dtype=torch.int32)
        for expert in chosen.unique().tolist():
            token, slot = torch.where(chosen == expert)
            y, used = self.experts[expert].forward(x[token], residual[token], mode=mode)
            out.index_add_(0, token, y * weights[token, slot, None])
            counts.index_add_(0, token, used)
        return out, counts


class Norm:
    """RMSNorm."""

    def __init__(self, weight: Tensor, eps: float):
        self.weight, self.eps = weight, eps

    def __call__(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))


class Rope:
    """Rotary position embedding of any kind whose frequencies are constant."""

    def __init__(self, config: Any):
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        kind = config.rope_parameters["rope_type"]
        if kind not in ROPE_TYPES:
            raise TurboSparseError(
                f"rope_type {kind!r} is not supported; supported are {', '.join(ROPE_TYPES)}"
            )
        rotary = LlamaRotaryEmbedding(config)  # the same for the four families
        self.frequencies, self.scale = rotary.inv_freq, rotary.attention_scaling

    def __call__(self, start: int, count: int) -> Rotation:
        angles = torch.arange(start, start + count)[:, None] * self.frequencies
        angles = torch.cat((angles, angles), -1)
        return Rotation(angles.cos() * self.scale, angles.sin() * self.scale)


class Rotation:
    """The turn of T positions; `cos` and `sin` are ``[T, D]``."""

    def __init__(self, cos: Tensor, sin: Tensor):
        self.cos, self.sin = cos, sin

    def turn(self, x: Tensor) -> Tensor:
        """Rotate ``[heads, T, D]``; the pairs are (d, d + D/2)."""
        left, right = x.chunk(2, -1)
        return x * self.cos + torch.cat((-right, left), -1) * self.sin


class Cache:
    """Keys and values of one sequence in half precision, ``[K, S, D]`` per layer."""

    def __init__(self, config: Any, context: int):
        heads, head = config.num_key_value_heads, families.config_head_dim(config)
        self.context, self.length = context, 0
        self._store = torch.empty(config.num_hidden_layers, 2, heads, 0, head, dtype=torch.half)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add the T newest positions of a layer; return all."""
        end = self.length + keys.shape[1]
        if end > self.context:
            raise TurboSparseError(f"{end} tokens do not fit the context of {self.context}")
        if end > self._store.shape[3]:
            self._grow(end)
        both = self._store[layer]
        both[0, :, self.length : end], both[1, :, self.length : end] = keys, values
        return both[0, :, :end].float(), both[1, :, :end].float()

    def _grow(self, end: int) -> None:
        room = min(self.context, max(64, 2 * end))
        layers, two, heads, _, head = self._store.shape
        store = torch.empty(layers, two, heads, room, head, dtype=torch.half)
        store[:, :, :, : self.length] = self._store[:, :, :, : self.length]
        self._store = store


def causal_mask(tokens: int, positions: int, window: int | None) -> Tensor:
    """Which of S positions each of the T newest tokens may see, bool ``[T, S]``."""
    query = torch.arange(positions - tokens, positions)[:, None]
    key = torch.arange(positions)
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


def sliding_window(config: Any, layer: int) -> int | None:
    """The attention window of a layer, or None for full attention."""
    types = getattr(config, "layer_types", None)
    if types and types[layer] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)
