"""Packed models of any shape with random weights that truly compute the asked sparsity.

Speed depends on shapes, quantisation and sparsity, not on what the weights say. So that nothing
about the sparsity is faked, the hidden state carries a constant direction (the first block of 32
features) that gate and up rows lean against: their pre-activations are normal with the mean that
makes the asked share positive, and every token computes its own active neurons.

Embeddings may walk: token i + n then has a correlation of `NEAR` ** n with token i. So a text that
takes every n-th token has as much in common from token to token as is asked, in neurons and in
experts.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from turbosparse import __version__
from turbosparse.base.errors import TurboSparseError
from turbosparse.base.folders import new_folder, write_json
from turbosparse.base.progress import track
from turbosparse.hf import families
from turbosparse.hf.activations import ACTIVATIONS, WITHOUT_ZEROS
from turbosparse.hf.load import with_activation
from turbosparse.ops.predictor import Predictor
from turbosparse.ops.quant import CODES, negative, quantise, signs
from turbosparse.ops.reference import sign_scores
from turbosparse.ops.rows import BLOCK, TILE, FFNRows, row_bytes, value_bytes
from turbosparse.packed.files import Spec, write_weights
from turbosparse.packed.format import cluster_neurons, layout
from turbosparse.packed.header import FFN, VERSION, Header, QuantMap

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
    "afm-4.5b": {
        "model_type": "arcee",
        "vocab_size": 128004,
        "hidden_size": 2560,
        "intermediate_size": 18432,
        "num_hidden_layers": 36,
        "num_attention_heads": 20,
        "num_key_value_heads": 4,
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
LOW_RANK_MARGIN, SIGN_MARGIN = 0.01, 0.02  # more candidates than active neurons, of all
NEAR = 0.99  # correlation of the embeddings of a token and the next, by number
QUIET = 1e-3  # o and down projections are this much smaller, so that the direction lasts


@dataclass(frozen=True)
class Wanted:
    """A synthetic model that is asked for, and what it names as its source.

    `sparsity` is the share of neurons with Combined zero; 0 makes a swiglu model. A shape without a
    gate is a relu2 model. `predictor` is ``rank=N``, ``sign`` or None.
    """

    shape: str
    sparsity: float = 0.9
    layers: int | None = None  # fewer than the shape has
    predictor: str | None = None
    predictor_quant: str = "q8"
    walks: bool = False  # embeddings of neighbouring tokens are alike
    bundled: bool = False

    def __str__(self) -> str:
        cut = f" with {self.layers} layers" if self.layers else ""
        kind = {None: "", "sign": ", predictor sign"}.get(
            self.predictor, f", predictor {self.predictor} {self.predictor_quant}"
        )
        return f"synthetic {self.shape}{cut}, sparsity {self.sparsity:g}{kind}" + (
            ", walking embeddings" * self.walks + ", bundled" * self.bundled
        )

    def check(self) -> None:
        """Raise TurboSparseError for what cannot be made."""
        if self.shape not in SHAPES:
            raise TurboSparseError(f"shape {self.shape!r} is unknown; use {', '.join(SHAPES)}")
        if not 0 <= self.sparsity < 1:
            raise TurboSparseError(f"sparsity {self.sparsity:g} must be 0 or more and less than 1")
        if not self.sparsity and self.activation not in WITHOUT_ZEROS:
            raise TurboSparseError(
                f"sparsity 0 makes a swiglu model, and {self.shape} has no gate; give more than 0"
            )
        if self.predictor and not self.sparsity:
            raise TurboSparseError("sparsity 0 makes a swiglu model: it has no zeros to predict")
        if self.predictor not in (None, "sign") and not self.rank:
            raise TurboSparseError(
                f"--predictor {self.predictor!r} is unknown; use sign, or rank=N with N a "
                f"multiple of {BLOCK}"
            )

    @property
    def activation(self) -> str:
        if SHAPES[self.shape]["model_type"] not in families.GATED:
            return "relu2"
        return "drelu" if self.sparsity else "swiglu"

    @property
    def deciding(self) -> int:
        """Rows of a neuron that make it inactive."""
        return len(ACTIVATIONS[self.activation].zero_by)

    @property
    def rank(self) -> int:
        """Of a low-rank predictor; 0 if it names none."""
        found = re.fullmatch(r"rank=(\d{1,5})", self.predictor or "", re.ASCII)
        return int(found[1]) if found and int(found[1]) % BLOCK == 0 else 0


def walk(random: np.random.Generator, rows: NDArray[Any]) -> None:
    """Give each row the values of the one before but for some, at random."""
    for last, row in pairwise(rows):
        kept = random.random(len(row), dtype=np.float32) < NEAR
        row[kept] = last[kept]


def stride_of(locality: float) -> int:
    """Every so many-th token has this correlation with the one before it; 0: random ones."""
    return round(math.log(locality) / math.log(NEAR)) if locality else 0


def make_synthetic(out: Path, wanted: Wanted, *, quant: str, seed: int = 0) -> None:
    """Write a packed folder of a named shape, without tokenizer, streaming to disk.

    Gate and up are positive independently, each with probability √(1 − sparsity). With a low-rank
    predictor, or without a gate, an up is positive with probability 1 − sparsity: where there is a
    gate, only where that is.

    Args:
        out: new folder.
        wanted: the model.
        quant: of `QUANTS`.
        seed: of the weights.

    Raises:
        TurboSparseError: unknown shape or predictor, sparsity out of range.
    """
    wanted.check()
    from transformers import AutoConfig

    fields = dict(SHAPES[wanted.shape])
    if wanted.layers:
        fields["num_hidden_layers"] = wanted.layers
    stock = AutoConfig.for_model(fields.pop("model_type"), **fields, max_position_embeddings=4096)
    config = with_activation(stock, wanted.activation)
    weights = _Weights(quant, wanted, seed)
    predictor, weights.shared = _predicted_ffn(config, wanted, weights)
    quants = QuantMap.uniform(quant)
    plan = layout(config, quants, predictor, bundled=wanted.bundled)
    parts = ACTIVATIONS[wanted.activation].parts
    with new_folder(out) as work:
        tensors = ((name, weights.make(name, spec, config)) for name, spec in plan.items())
        files = write_weights(work, plan, track(tensors, f"making {wanted.shape}", total=len(plan)))
        header = Header(
            format_version=VERSION,
            quant=quants,
            cluster_neurons=cluster_neurons(config.hidden_size, quants.of(parts)),
            ffn=FFN(activation=wanted.activation, predictor=predictor),  # type: ignore[arg-type]
            neuron_order="model",
            bundled=wanted.bundled,
            source=str(wanted),
            packed_by=f"turbosparse {__version__}",
            files=files,
        )
        write_json(work / "config.json", config.to_dict() | {"turbosparse": header.model_dump()})


def _predicted_ffn(
    config: Any, wanted: Wanted, weights: _Weights
) -> tuple[Predictor | None, dict[str, NDArray[Any]]]:
    """A predictor, and what every layer then has in common, by the last part of its name.

    These are the predictor's tensors and the rows that it knows, ``gate`` and ``up``. Each
    layer's input is another, so each computes its own activity. Downs are not shared: over many
    layers the same ones would add up to a direction of their own.
    """
    if wanted.rank:
        return _low_rank_ffn(config, wanted, weights)
    if wanted.predictor:
        return _sign_ffn(config, wanted, weights)
    return None, {}


def _low_rank_ffn(
    config: Any, wanted: Wanted, weights: _Weights
) -> tuple[Predictor, dict[str, NDArray[Any]]]:
    """Gate and up rows are B · A and a lean, with A ``[rank / 2, hidden]``.

    relu of A · x and −A · x gives A · x, hence fc1 is ±A, fc2 is ±B and a logit B · A · x; up is
    positive where that exceeds what the row leans by. What is missed is what quantising changes.
    """
    hidden, neurons = config.hidden_size, config.intermediate_size
    half = wanted.rank // 2
    spread = SPREAD / 4  # gate and up are large together: else the outputs turn the direction
    a = weights.random.standard_normal((half, hidden), dtype=np.float32) * spread
    a[:, :BLOCK] = 0  # the constant features are for the lean
    b = weights.random.standard_normal((neurons, half), dtype=np.float32) / half**0.5
    rows = torch.from_numpy(b @ a)
    parts = []
    shares = (1 - wanted.sparsity) ** 0.5, 1 - wanted.sparsity
    for share in shares[-wanted.deciding :]:
        rows[:, :BLOCK] = lean(share, hidden) * spread
        parts.append(quantise(rows, weights.quant).numpy())
    quant = wanted.predictor_quant
    fc1, fc2 = np.concatenate((a, -a)), np.concatenate((b, -b), axis=1)
    # of the features that are not constant, behind RMSNorm
    deviation = ((BLOCK * CONSTANT**2 + hidden - BLOCK) / hidden) ** -0.5
    density = min(1 - wanted.sparsity + LOW_RANK_MARGIN, 0.999)
    threshold = NormalDist().inv_cdf(1 - density) * (hidden - BLOCK) ** 0.5 * spread * deviation
    predictor = Predictor(
        kind="low_rank",
        quant=quant,  # type: ignore[arg-type]
        input="post_norm",
        threshold=threshold,
        ranks=[[wanted.rank] * max(1, families.experts(config))] * config.num_hidden_layers,
    )
    return predictor, {
        "gate": parts[0],
        "up": parts[-1],
        "fc1": quantise(torch.from_numpy(fc1), quant).numpy(),
        "fc2": quantise(torch.from_numpy(fc2), quant).numpy(),
    }


def _sign_ffn(
    config: Any, wanted: Wanted, weights: _Weights
) -> tuple[Predictor, dict[str, NDArray[Any]]]:
    """Random rows, whose signs say little, and the threshold that lets the wanted share pass."""
    hidden = config.hidden_size
    count = wanted.deciding
    rows = [weights.leaning(config.intermediate_size, hidden) for _ in range(count)]
    quants = (weights.quant,) * (count + 1)
    bits = signs(FFNRows.join([*rows, rows[-1]], hidden, quants), count)
    x = torch.from_numpy(weights.random.random((64, hidden)) < 0.5)
    x[:, :BLOCK] = False  # the constant features are positive
    some = torch.from_numpy(bits[:2048])
    scores = [sign_scores(x, negative(part, hidden)) for part in some.chunk(count, dim=1)]
    density = min(1 - wanted.sparsity + SIGN_MARGIN, 1.0)
    threshold = float(np.quantile(torch.stack(scores).amin(0).numpy(), 1 - density))
    predictor = Predictor(kind="sign", input="post_norm", threshold=threshold)
    return predictor, {"gate": rows[0], "up": rows[-1], "signs": bits}


def lean(share: float, cols: int) -> float:
    """The first 32 weights of a row at which its pre-activation is positive for this share.

    In deviations of its other weights. An embedding is `CONSTANT` in 32 features and has deviation
    1 in the others, up to a factor that RMSNorm takes away: the sum over the others has deviation
    √(cols − 32), and the sum over the constant ones is 32 · CONSTANT times the weight.
    """
    return float(NormalDist().inv_cdf(share) * (cols - BLOCK) ** 0.5 / (BLOCK * CONSTANT))


# without these as many codes are negative as positive, and their sum is 0
_UNBALANCED = {"q4": (-127, -49, 13, 69), "q4_0": (-8,)}


class _Weights:
    """Random tensors in packed form."""

    def __init__(self, quant: str, wanted: Wanted, seed: int):
        self.quant, self.wanted = quant, wanted
        self.shared: dict[str, NDArray[Any]] = {}
        self.random = np.random.default_rng(seed)
        if quant == "f16":
            normal = self.random.standard_normal(1 << 24, dtype=np.float32) * SPREAD
            self.pools = {f: (normal * f).astype("<f2").view(np.uint8) for f in (1.0, QUIET)}
        elif quant == "q8":
            self.pool = self.random.integers(-127, 128, 1 << 26, dtype=np.int8).view(np.uint8)
            self.deviation = 73.6  # of uniform −127…127
        else:  # nibbles whose weights have mean 0
            codes = np.array(CODES[quant])
            nibbles = np.flatnonzero(~np.isin(codes, _UNBALANCED[quant])).astype(np.uint8)
            low, high = nibbles[self.random.integers(0, len(nibbles), (2, 1 << 26), np.uint8)]
            self.pool = low | high << 4
            self.deviation = float(codes[nibbles].std())

    def make(self, name: str, spec: Spec, config: Any) -> NDArray[Any]:
        last = name.rpartition(".")[2] if spec.role == "predictor" else spec.role
        if last in self.shared:
            return self.shared[last]
        if spec.dtype == "I32":
            return np.arange(spec.shape[0], dtype=np.int32)
        if spec.dtype == "F32":
            return self._small(spec)
        rows, stride = spec.shape
        hidden = config.hidden_size
        if last == "gate":
            return self.leaning(rows, hidden)
        if last == "pairs":
            return self._pairs(rows, hidden)
        if last == "bundles":
            gates = self.shared["gate"] if "gate" in self.shared else self.leaning(rows, hidden)
            whole = np.concatenate((gates, self._pairs(rows, hidden)), 1)
            return np.pad(whole, ((0, 0), (0, stride - whole.shape[1])))
        if last == "o":
            heads = config.num_attention_heads * families.config_head_dim(config)
            return self._rows(rows, heads, stride, QUIET)
        matrix = self._rows(rows, hidden, stride)
        if last == "embedding":
            if self.wanted.walks:
                values = matrix[:, : value_bytes(self.quant, hidden)]
                walk(self.random, values.view("<u2") if self.quant == "f16" else values)
            self._first_block(matrix, hidden, CONSTANT * SPREAD)
        return matrix

    def _pairs(self, neurons: int, hidden: int) -> NDArray[np.uint8]:
        down = self._rows(neurons, hidden, row_bytes(self.quant, hidden), QUIET)
        if self.wanted.activation == "relu2":
            return down
        up = self.shared["up"] if "up" in self.shared else self.leaning(neurons, hidden)
        return np.concatenate((up, down), 1)

    def leaning(self, neurons: int, hidden: int) -> NDArray[np.uint8]:
        """Gate or up rows of neurons; together they are active as often as is asked."""
        rows = self._rows(neurons, hidden, row_bytes(self.quant, hidden))
        if self.wanted.deciding:
            share = (1 - self.wanted.sparsity) ** (1 / self.wanted.deciding)
            self._first_block(rows, hidden, lean(share, hidden) * SPREAD)
        return rows

    def _small(self, spec: Spec) -> NDArray[np.float32]:
        if spec.role in ("attention_norm", "ffn_norm", "norm"):
            return np.ones(spec.shape, np.float32)
        values = self.random.standard_normal(spec.shape, dtype=np.float32)
        if spec.role == "router":  # it does not see the constant: tokens choose different experts
            values[:, :BLOCK] = 0
        return values

    def _rows(self, rows: int, cols: int, stride: int, factor: float = 1.0) -> NDArray[np.uint8]:
        """``[rows, stride]`` of random weights with standard deviation `factor` · `SPREAD`."""
        out = np.zeros((rows, stride), np.uint8)
        payload = value_bytes(self.quant, cols)
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
        values = value_bytes(self.quant, cols)
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
                one = CODES[self.quant].index(1)
                rows[:, word * 4 * blocks : word * 4 * blocks + 4] = one | one << 4
            self._scales(rows, cols)[:, 0] = value
