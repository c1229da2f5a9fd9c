"""The decoder in C++ (`csrc/decoder.cpp`), with the interface of its twin in `model.py`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from turbosparse import _core
from turbosparse.base.errors import TurboSparseError
from turbosparse.engine.model import Rope, sliding_window
from turbosparse.hf import families
from turbosparse.ops import Mode
from turbosparse.ops.cpu import neurons
from turbosparse.ops.rows import row_bytes
from turbosparse.packed.format import Packed, ffn_prefix

PAGE = 64  # positions, as in csrc/decoder.h


class Cache:
    """Keys and values of one sequence, in half precision, growing by pages up to the context."""

    def __init__(self, native: _core.Cache, context: int):
        self.native, self.context = native, context

    @property
    def length(self) -> int:
        return self.native.length


class Decoder:
    """A packed model, ready to run: one call into the C++ core for each step.

    Raises:
        TurboSparseError: a RoPE variant that is not supported, or an instruction set asked for by
            TURBOSPARSE_ISA that this machine does not have.
    """

    def __init__(self, packed: Packed, *, threads: int):
        try:
            self.isa = _core.isa()
        except ValueError as error:
            raise TurboSparseError(str(error)) from error
        config = packed.config
        self.config, self.threads = config, threads
        rope = Rope(config)
        hidden = config.hidden_size
        name = families.table(config).name
        embedding = _matrix(packed, name("embedding"), hidden)
        head = embedding if config.tie_word_embeddings else _matrix(packed, name("head"), hidden)
        self.vocabulary = embedding.rows
        heads = config.num_hidden_layers * config.num_key_value_heads
        self._position_bytes = 2 * heads * row_bytes("f16", 2 * len(rope.frequencies))
        self._native = _core.Decoder(
            embedding,
            head,
            packed.tensors[name("norm")],
            [_layer(packed, index) for index in range(config.num_hidden_layers)],
            rope.frequencies.numpy(),
            rope.scale,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.num_experts_per_tok if families.experts(config) else 1,
            config.rms_norm_eps,
        )

    def new_cache(self, context: int) -> Cache:
        return Cache(self._native.new_cache(), context)

    def __call__(
        self, tokens: list[int], cache: Cache, *, mode: Mode, every: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Read `tokens` after what the cache holds; see `model.Decoder`."""
        return self.step([tokens], [cache], mode=mode, every=every)

    def step(
        self, tokens: list[list[int]], caches: list[Cache], *, mode: Mode, every: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Read the next tokens of several sequences; a weight row is read once for all of them.

        Args:
            tokens: of each sequence, at least one.
            caches: of each sequence, all different.
            mode: which rows of the feed-forwards are read.
            every: return logits of every token, not only of the last of each sequence.

        Returns:
            Logits, float32 ``[sequences or tokens, vocabulary]``, and the neurons used, int32
            ``[layers, tokens, 3]``: candidates, with positive gate, and active.

        Raises:
            TurboSparseError: a context is full, or there is no memory; nothing was done then.
        """
        for new, cache in zip(tokens, caches, strict=True):
            end = cache.length + len(new)
            if end > cache.context:
                raise TurboSparseError(f"{end} tokens do not fit the context of {cache.context}")
        total = sum(map(len, tokens))
        rows = total if every else len(tokens)
        try:
            logits = np.empty((rows, self.vocabulary), np.float32)
            counts = np.empty((self.config.num_hidden_layers, total, 3), np.int32)
            self._native.step(
                [cache.native for cache in caches],
                [np.array(new, np.int32) for new in tokens],
                every,
                mode,
                self.threads,
                logits,
                counts,
            )
        except MemoryError as error:
            ends = [cache.length + len(new) for new, cache in zip(tokens, caches, strict=True)]
            size = sum(-(-end // PAGE) for end in ends) * PAGE * self._position_bytes
            raise TurboSparseError(
                f"out of memory in a step of {total} tokens: {sum(ends)} positions need "
                f"{size / 1e6:.1f} MB of key-value cache; use a shorter prompt or fewer sequences"
            ) from error
        return torch.from_numpy(logits), torch.from_numpy(counts)


def _matrix(packed: Packed, name: str, cols: int) -> _core.Matrix:
    return _core.Matrix(packed.tensors[name], cols, packed.quant)


def _layer(packed: Packed, index: int) -> _core.Layer:
    config, tensors = packed.config, packed.tensors
    parts = families.layer_tensors(config, index)
    vectors = {role: tensors.get(tensor.name) for role, tensor in parts.items()}
    experts: list[int | None] = list(range(families.experts(config))) or [None]
    return _core.Layer(
        [_matrix(packed, parts[role].name, parts[role].shape[1]) for role in "qkvo"],
        [vectors.get(f"{role}.bias") for role in "qkvo"],
        tensors[parts["attention_norm"].name],
        tensors[parts["ffn_norm"].name],
        vectors.get("router"),
        [
            neurons(
                tensors[f"{ffn}ffn"],
                config.hidden_size,
                packed.quant,
                packed.activation,
                packed.predictor(ffn),
            )
            for ffn in (ffn_prefix(index, expert) for expert in experts)
        ],
        sliding_window(config, index) or 0,
    )
