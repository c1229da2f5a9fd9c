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
from turbosparse.packed.format import Packed, ffn_prefix


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
        name = families.table(config).name
        embedding = _matrix(packed, name("embedding"))
        head = embedding if config.tie_word_embeddings else _matrix(packed, name("head"))
        self.vocabulary = embedding.rows
        self._head = 2 * len(rope.frequencies)
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

    def new_cache(self, context: int) -> _core.Cache:
        return self._native.new_cache(context)

    def cache_bytes(self, positions: int) -> int:
        """Memory of a cache that holds `positions` tokens."""
        config = self.config
        shape = config.num_hidden_layers, config.num_key_value_heads, self._head
        return _core.cache_bytes(positions, *shape)

    def __call__(
        self, tokens: list[int], cache: _core.Cache, *, mode: Mode, every: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Read `tokens` after what the cache holds; see `model.Decoder`."""
        return self.step([tokens], [cache], mode=mode, every=every)

    def step(
        self,
        tokens: list[list[int]],
        caches: list[_core.Cache],
        *,
        mode: Mode,
        every: bool = False,
        cancel: _core.Cancel | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Read the next tokens of several sequences; a weight row is read once for all of them.

        Args:
            tokens: of each sequence, at least one.
            caches: of each sequence, all different.
            mode: which rows of the feed-forwards are read.
            every: return logits of every token, not only of the last of each sequence.
            cancel: ends the step between two layers when it is set from another thread.

        Returns:
            Logits, float32 ``[sequences or tokens, vocabulary]``, and the neurons used, int32
            ``[layers, tokens, 3]``: candidates, with positive gate, and active.

        Raises:
            TurboSparseError: a context is full, a cache belongs to another model or is given twice,
                or there is no memory.
            _core.Cancelled: `cancel` was set.
            After both the caches are as they were before.
        """
        total = sum(map(len, tokens))
        rows = total if every else len(tokens)
        try:
            logits = np.empty((rows, self.vocabulary), np.float32)
            counts = np.empty((self.config.num_hidden_layers, total, 3), np.int32)
            self._native.step(
                caches,
                [np.array(new, np.int32) for new in tokens],
                every,
                mode,
                self.threads,
                logits,
                counts,
                cancel,
            )
        except ValueError as error:
            raise TurboSparseError(str(error)) from error
        except MemoryError as error:
            ends = [cache.length + len(new) for new, cache in zip(tokens, caches, strict=True)]
            size = sum(map(self.cache_bytes, ends))
            raise TurboSparseError(
                f"out of memory in a step of {total} tokens: {sum(ends)} positions need "
                f"{size / 1e6:.1f} MB of key-value cache; use a shorter prompt or fewer sequences"
            ) from error
        return torch.from_numpy(logits), torch.from_numpy(counts)


def _matrix(packed: Packed, name: str) -> _core.Matrix:
    spec = packed.plan[name]
    return _core.Matrix(packed.tensors[name], spec.cols, spec.quant)


def _layer(packed: Packed, index: int) -> _core.Layer:
    config, tensors = packed.config, packed.tensors
    parts = families.layer_tensors(config, index)
    vectors = {role: tensors.get(tensor.name) for role, tensor in parts.items()}
    experts: list[int | None] = list(range(families.experts(config))) or [None]
    return _core.Layer(
        [_matrix(packed, parts[role].name) for role in "qkvo"],
        [vectors.get(f"{role}.bias") for role in "qkvo"],
        tensors[parts["attention_norm"].name],
        tensors[parts["ffn_norm"].name],
        vectors.get("router"),
        [
            neurons(packed.ffn(ffn), packed.activation, packed.predictor(ffn))
            for ffn in (ffn_prefix(index, expert) for expert in experts)
        ],
        sliding_window(config, index) or 0,
    )
