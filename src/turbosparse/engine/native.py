"""The decoder in C++ (`csrc/decoder.cpp`), with the interface of its twin in `model.py`.

Loads no torch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from turbosparse import _core
from turbosparse.base.errors import TurboSparseError
from turbosparse.engine.positions import rope, sliding_window
from turbosparse.engine.sequence import Cancelled
from turbosparse.engine.streaming import Stores
from turbosparse.hf import families
from turbosparse.hf.count import experts_in_use
from turbosparse.ops import Mode, fetching
from turbosparse.ops.native import neurons
from turbosparse.packed.format import Packed, ffn_prefix


class Decoder:
    """A packed model, ready to run: one call into the C++ core for each step.

    Raises:
        TurboSparseError: an instruction set asked for by TURBOSPARSE_ISA that this machine does
            not have, or a TURBOSPARSE_FETCH that is not understood.
    """

    def __init__(self, packed: Packed, *, threads: int, stores: Stores | None = None):
        try:
            self.isa = _core.isa()
        except ValueError as error:
            raise TurboSparseError(str(error)) from error
        self.folder, self.stores = packed.folder, stores
        weights = sum(tensor.nbytes for tensor in packed.tensors.values())
        self.fetching = fetching.choose(threads, weights)
        config = packed.config
        self.config, self.threads = config, threads
        name = families.table(config).name
        head_dim = families.config_head_dim(config)
        frequencies, scale = rope(config.rope_parameters, head_dim)
        embedding = _matrix(packed, name("embedding"))
        head = embedding if config.tie_word_embeddings else _matrix(packed, name("head"))
        self.vocabulary = embedding.rows
        norm, norm_bias = packed.norm("norm")
        self._shape = config.num_hidden_layers, config.num_key_value_heads, head_dim
        self._native = _core.Decoder(
            embedding,
            head,
            norm,
            [_layer(packed, index, stores) for index in range(config.num_hidden_layers)],
            frequencies,
            scale,
            config.num_attention_heads,
            config.num_key_value_heads,
            head_dim,
            experts_in_use(config),
            config.eps,
            norm_bias,
        )

    def new_cache(self, context: int) -> _core.Cache:
        """Keys and values of one sequence, in half precision, growing by pages up to `context`."""
        return self._native.new_cache(context)

    def cache_bytes(self, positions: int, context: int) -> int:  # noqa: ARG002
        """Memory of a cache that holds this many positions of its context."""
        return _core.cache_bytes(positions, *self._shape)

    def new_cancel(self) -> _core.Cancel:
        return _core.Cancel()

    def step(
        self,
        tokens: list[list[int]],
        caches: list[_core.Cache],
        *,
        mode: Mode,
        every: bool = False,
        cancel: _core.Cancel | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Read the next tokens of several sequences; a weight row is read once for all of them.

        Args:
            tokens: of each sequence, at least one.
            caches: of each sequence, all different.
            mode: which rows of the feed-forwards are read.
            every: return logits of every token, not only of the last of each sequence.
            cancel: once set, from another thread, it ends the step between two layers.

        Returns:
            Logits, float32 ``[sequences or tokens, vocabulary]``, and the neurons used, int32
            ``[layers, tokens, 3]``: candidates, with positive gate, and active (summed over a
            token's experts).

        Raises:
            TurboSparseError: a context is full, there is no memory, or `Cancelled`; the caches
                are as they were.
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
        except _core.Cancelled as error:
            raise Cancelled(str(error)) from error
        except _core.ReadError as error:
            raise TurboSparseError(
                f"{self.folder}: {error}: the disk failed, or the file was changed; "
                "see `turbosparse validate`"
            ) from error
        except MemoryError as error:
            ends = [cache.length + len(new) for new, cache in zip(tokens, caches, strict=True)]
            size = sum(self.cache_bytes(end, 0) for end in ends)
            raise TurboSparseError(
                f"out of memory in a step of {total} tokens: {sum(ends)} positions need "
                f"{size / 1e6:.1f} MB of key-value cache; use a shorter prompt or fewer sequences"
            ) from error
        except ValueError as error:  # of the core, in words: a mode or a context
            raise TurboSparseError(str(error)) from error
        return logits, counts


def _matrix(packed: Packed, name: str) -> _core.Matrix:
    spec = packed.plan[name]
    return _core.Matrix(packed.tensors[name], spec.cols, spec.quant)


def _layer(packed: Packed, index: int, stores: Stores | None) -> _core.Layer:
    config, tensors = packed.config, packed.tensors
    parts = families.layer_tensors(config, index)
    vectors = {role: tensors.get(tensor.name) for role, tensor in parts.items()}
    experts: list[int | None] = list(range(families.experts(config))) or [None]
    attention_norm, attention_norm_bias = packed.norm("attention_norm", index)
    ffn_norm, ffn_norm_bias = packed.norm("ffn_norm", index)
    return _core.Layer(
        [_matrix(packed, parts[role].name) for role in "qkvo"],
        [vectors.get(f"{role}.bias") for role in "qkvo"],
        attention_norm,
        ffn_norm,
        vectors.get("router"),
        [
            neurons(
                packed.ffn(ffn),
                packed.activation,
                packed.predictor(ffn),
                packed.header.ffn.threshold,
                stores.of(ffn) if stores else {},
            )
            for ffn in (ffn_prefix(index, expert) for expert in experts)
        ],
        sliding_window(config, index) or 0,
        attention_norm_bias,
        ffn_norm_bias,
    )
