"""Packed models of any shape with random weights that truly compute the asked sparsity.

Speed depends on shapes, quantisation and sparsity, not on what the weights say. So that nothing
about the sparsity is faked, the hidden state carries a constant direction (the first block of 32
features) that gate and up rows lean against: their pre-activations are normal with the mean that
makes the asked share positive, and every token computes its own active neurons.
"""

from __future__ import annotations

from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turbosparse import __version__
from turbosparse.folders import TurboSparseError, new_folder, write_json
from turbosparse.format import FFN, VERSION, Header, Spec, layout, write_weights
from turbosparse.hf import names
from turbosparse.hf.load import with_activation
from turbosparse.progress import track
from turbosparse.quant import BLOCK, TILE

# the architectures that people ask about; `layers` may be cut to fit a machine
SHAPES: dict[str, dict[str, Any]] = {
    "mistral-7b": {
        "model_type": "mistral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "sliding_window": None,
    },
    "mixtral-8x7b": {
        "model_type": "mixtral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "llama-1b": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "llama-15m": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 288,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "tie_word_embeddings": True,
    },
}

SPREAD = 0.02  # standard deviation of a weight
CONSTANT = 4.0  # the constant features of an embedding, in standard deviations of the others
QUIET = 1e-3  # o and down projections are this much smaller, so that the direction lasts


def make_synthetic(
    out: Path, shape: str, *, quant: str, sparsity: float, layers: int | None = None, seed: int = 0
) -> None:
    """Write a packed folder of a named shape, without tokenizer, streaming to disk.

    Args:
        out: new folder.
        shape: one of `SHAPES`.
        quant: ``f16``, ``q8`` or ``q4``.
        sparsity: share of neurons with Combined zero; gate and up are positive independently, each
            with probability √(1 − sparsity). 0 makes a swiglu model.
        layers: fewer layers than the shape has.
        seed: of the weights.

    Raises:
        TurboSparseError: unknown shape, sparsity out of range.
    """
    source = describe(shape, sparsity, layers)
    if shape not in SHAPES:
        raise TurboSparseError(f"shape {shape!r} is unknown; use {', '.join(SHAPES)}")
    if not 0 <= sparsity < 1:
        raise TurboSparseError(f"sparsity {sparsity:g} must be 0 or more and less than 1")
    from transformers import AutoConfig

    fields = dict(SHAPES[shape])
    if layers:
        fields["num_hidden_layers"] = layers
    activation = "drelu" if sparsity else "swiglu"
    stock = AutoConfig.for_model(fields.pop("model_type"), **fields, max_position_embeddings=4096)
    config = with_activation(stock, activation)
    plan = layout(config, quant)
    weights = _Weights(quant, sparsity, seed)
    with new_folder(out) as work:
        tensors = ((name, weights.make(name, spec, config)) for name, spec in plan.items())
        files = write_weights(work, plan, track(tensors, f"making {shape}", total=len(plan)))
        header = Header(
            format_version=VERSION,
            quant=quant,  # type: ignore[arg-type]
            ffn=FFN(activation=activation),  # type: ignore[arg-type]
            neuron_order="model",
            source=source,
            packed_by=f"turbosparse {__version__}",
            files=files,
        )
        write_json(work / "config.json", config.to_dict() | {"turbosparse": header.model_dump()})


def describe(shape: str, sparsity: float, layers: int | None) -> str:
    """What a synthetic folder names as its source."""
    cut = f" with {layers} layers" if layers else ""
    return f"synthetic {shape}{cut}, sparsity {sparsity:g}"


class _Weights:
    """Random tensors in packed form."""

    def __init__(self, quant: str, sparsity: float, seed: int):
        self.quant, self.sparsity = quant, sparsity
        self.random = np.random.default_rng(seed)
        if quant == "f16":
            normal = self.random.standard_normal(1 << 24, dtype=np.float32) * SPREAD
            self.pools = {f: (normal * f).astype("<f2").view(np.uint8) for f in (1.0, QUIET)}
        elif quant == "q8":
            self.pool = self.random.integers(-127, 128, 1 << 26, dtype=np.int8).view(np.uint8)
            self.deviation = 73.6  # of uniform −127…127
        else:  # nibbles of −7…7: all weights have mean 0
            low, high = self.random.integers(1, 16, (2, 1 << 26), dtype=np.uint8)
            self.pool = low | high << 4
            self.deviation = 4.32

    def make(self, name: str, spec: Spec, config: Any) -> NDArray[Any]:
        if spec.dtype == "I32":
            return np.arange(spec.shape[0], dtype=np.int32)
        if spec.dtype == "F32":
            return self._small(name, spec)
        rows, stride = spec.shape
        hidden = config.hidden_size
        if name.endswith(".ffn"):
            gate, up = (self._rows(rows, hidden, stride // 3) for _ in range(2))
            if self.sparsity:
                self._lean(gate, hidden)
                self._lean(up, hidden)
            return np.concatenate((gate, up, self._rows(rows, hidden, stride // 3, QUIET)), axis=1)
        if name.endswith("o_proj.weight"):
            heads = config.num_attention_heads * names.config_head_dim(config)
            return self._rows(rows, heads, stride, QUIET)
        matrix = self._rows(rows, hidden, stride)
        if name == names.EMBEDDING:
            self._first_block(matrix, hidden, CONSTANT * SPREAD)
        return matrix

    def _small(self, name: str, spec: Spec) -> NDArray[np.float32]:
        if "norm" in name:
            return np.ones(spec.shape, np.float32)
        values = self.random.standard_normal(spec.shape, dtype=np.float32)
        if (
            "gate" in name
        ):  # a router that does not see the constant: tokens choose different experts
            values[:, :BLOCK] = 0
        return values

    def _rows(self, rows: int, cols: int, stride: int, factor: float = 1.0) -> NDArray[np.uint8]:
        """``[rows, stride]`` of random weights with standard deviation `factor` · `SPREAD`."""
        out = np.zeros((rows, stride), np.uint8)
        payload = {"f16": 2 * cols, "q8": cols, "q4": cols // 2}[self.quant]
        pool = self.pools[factor] if self.quant == "f16" else self.pool
        step = max(1, (len(pool) - payload) // payload)
        for start in range(0, rows, step):
            count = min(step, rows - start)
            at = 2 * int(self.random.integers(0, (len(pool) - count * payload) // 2 + 1))
            piece = pool[at : at + count * payload]
            out[start : start + count, :payload] = piece.reshape(count, -1)
        if self.quant != "f16":
            self._scales(out, cols)[:] = np.float16(factor * SPREAD / self.deviation)
        return out

    def _scales(self, rows: NDArray[np.uint8], cols: int) -> NDArray[np.float16]:
        values = cols if self.quant == "q8" else cols // 2
        return rows[:, values : values + 2 * cols // BLOCK].view("<f2")

    def _first_block(self, rows: NDArray[np.uint8], cols: int, value: float) -> None:
        """Set the first 32 weights of each row to `value`."""
        if self.quant == "f16":
            rows.view("<f2")[:, :BLOCK] = value
        elif self.quant == "q8":
            rows[:, :BLOCK] = 1
            self._scales(rows, cols)[:, 0] = value
        else:
            blocks = min(TILE, cols // BLOCK)  # of the first tile
            for word in range(4):
                rows[:, word * 4 * blocks : word * 4 * blocks + 4] = 0x99  # nibble 9 is weight 1
            self._scales(rows, cols)[:, 0] = value

    def _lean(self, rows: NDArray[np.uint8], cols: int) -> None:
        """Give rows the mean pre-activation at which √(1 − sparsity) of them are positive.

        An embedding is `CONSTANT` in 32 features and has deviation 1 in the others, up to a factor
        that RMSNorm takes away: the sum over the others has deviation √(cols − 32) · SPREAD, and
        the sum over the constant ones is 32 · CONSTANT times the weight set here.
        """
        quantile = NormalDist().inv_cdf(1 - (1 - self.sparsity) ** 0.5)
        weight = -quantile * (cols - BLOCK) ** 0.5 * SPREAD / (BLOCK * CONSTANT)
        self._first_block(rows, cols, weight)
