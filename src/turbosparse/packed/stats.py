"""What `analyse` counts of a model's neurons, and the file that it stands in."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from turbosparse.base.errors import TurboSparseError
from turbosparse.base.folders import new_file
from turbosparse.hf import families
from turbosparse.packed.header import Profile

# what the matrices of a role read, by its name in `Stats.squares`
_READS = {"q": "qkv", "k": "qkv", "v": "qkv", "o": "o", "gate": "ffn", "up": "ffn", "head": "head"}
_COUNTS = ("active", "gate_positive", "tokens")
# not *.safetensors: loaders take every file of that name in a folder for weights
FILE = "stats.turbosparse"


@dataclass
class Stats:
    """Counts over the predicted tokens of a corpus; E is 1 for a dense model.

    Shapes: `active` and `gate_positive` ``[layers, E, neurons]``, `tokens` ``[layers, E]`` (tokens
    that reached the expert), all int64.
    """

    active: Tensor
    gate_positive: Tensor
    tokens: Tensor
    nats: dict[str, float] = field(default_factory=dict)  # summed over the tokens of each corpus
    predicted: dict[str, int] = field(default_factory=dict)  # tokens of each corpus
    sparsity: dict[str, float] = field(default_factory=dict)  # activation sparsity of each corpus
    # threshold → share of Combined below this part of a token's largest; of activations without
    # exact zeros
    near_zero: dict[str, float] = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)  # model, activation
    # of what matrices read, summed over the tokens: qkv, o and ffn ``[layers, cols]``, head
    # ``[1, cols]``
    squares: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def empty(cls, config: Any) -> Stats:
        shape = (config.num_hidden_layers, families.experts(config) or 1, config.intermediate_size)
        zeros, size = torch.zeros(shape, dtype=torch.int64), families.sizes(config)
        inputs = {"qkv": (shape[0], "H"), "o": (shape[0], "Q"), "ffn": (shape[0], "H")}
        squares = {
            kind: torch.zeros(layers, size[cols])
            for kind, (layers, cols) in (inputs | {"head": (1, "H")}).items()
        }
        tokens = torch.zeros(shape[:2], dtype=torch.int64)
        return cls(zeros, zeros.clone(), tokens, squares=squares)

    def importance(self, role: str, layer: int | None) -> Tensor | None:
        """How much each column of a matrix matters, ``[cols]``: the squares that it met.

        None where nothing is known, as of a packed down row, whose weights all meet the same
        Combined.
        """
        kind = _READS.get(role)
        return self.squares[kind][layer or 0] if kind else None

    def active_ratio(self) -> Tensor:
        """Share of Combined entries that are not zero, ``[layers, E]`` float64."""
        return self.active.sum(-1) / (self.tokens.clamp(min=1) * self.active.shape[-1]).double()

    def gate_ratio(self) -> Tensor:
        """Share of gate pre-activations above zero, ``[layers, E]`` float64."""
        return (
            self.gate_positive.sum(-1) / (self.tokens.clamp(min=1) * self.active.shape[-1]).double()
        )

    def per_layer(self, ratio: Tensor) -> Tensor:
        """Mean over the experts of a layer, each weighted by the tokens it saw, ``[layers]``."""
        return (ratio * self.tokens).sum(-1) / self.tokens.sum(-1).clamp(min=1)

    def activation_sparsity(self) -> float:
        """Share of exact zeros in Combined, mean over layers (in MoE: of the experts in use)."""
        return 1 - float(self.per_layer(self.active_ratio()).mean())

    def nats_per_token(self, corpus: str | None = None) -> float:
        """Cross-entropy in nats per token, of one corpus or of all."""
        chosen = [corpus] if corpus else list(self.nats)
        return sum(self.nats[c] for c in chosen) / max(1, sum(self.predicted[c] for c in chosen))

    def perplexity(self, corpus: str | None = None) -> float:
        """``exp`` of the nats per token; infinite beyond what a float holds."""
        nats = self.nats_per_token(corpus)
        return math.exp(nats) if nats < 709 else math.inf

    def hot_share(self, carried: float = 0.8) -> list[list[float]]:
        """Smallest share of neurons that makes up `carried` of the activations, [layer][expert]."""
        counts = self.active.sort(-1, descending=True).values.cumsum(-1).double()
        enough = counts >= carried * counts[..., -1:]
        hot: list[list[float]] = ((1 + (~enough).sum(-1)) / self.active.shape[-1]).tolist()
        return hot

    def save(self, path: Path) -> None:
        from safetensors.torch import save_file

        fields = ("nats", "predicted", "sparsity", "near_zero", "about")
        about = {name: getattr(self, name) for name in fields}
        with new_file(path) as work:
            save_file(self._tensors(), work, metadata={"turbosparse": json.dumps(about)})

    def _tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in _COUNTS} | self.squares

    @classmethod
    def load(cls, path: Path) -> Stats:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads(file.metadata()["turbosparse"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            counts = [tensors.pop(name) for name in _COUNTS]
            stats = cls(*counts, **(about | {"squares": tensors}))
            stats.nats_per_token()  # raises unless these are numbers
            return stats
        except (
            SafetensorError,
            OSError,
            KeyError,
            TypeError,
            ValueError,
            AttributeError,
        ) as error:
            raise TurboSparseError(
                f"{path} is not a statistics file ({error}); make one with `turbosparse analyse`"
            ) from error

    @classmethod
    def find(cls, folder: Path, path: Path | None = None) -> Stats | None:
        """Those in the file `path`, or in a model folder; None if the folder holds none."""
        if path is not None and not path.is_file():
            raise TurboSparseError(
                f"no such statistics file: {path}; make one with `turbosparse analyse`"
            )
        path = path or folder / FILE
        return cls.load(path) if path.is_file() else None

    def profile(self) -> Profile:
        """What a packed folder keeps of them."""
        return Profile(
            tokens=sum(self.predicted.values()),
            nats_per_token=self.nats_per_token(),
            active=self.active_ratio().tolist(),
            gate_positive=self.gate_ratio().tolist(),
            expert_tokens=self.tokens.tolist(),
        )

    def check(self, config: Any) -> None:
        """Raise unless these statistics are of a model of this shape."""
        own, needed = self._tensors(), Stats.empty(config)._tensors()
        for name in own | needed:
            mine, expected = (_describe(tensors.get(name)) for tensors in (own, needed))
            if mine != expected:
                raise TurboSparseError(
                    f"the statistics are of another model: {name} is {mine}, this model needs "
                    f"{expected}; run `turbosparse analyse` on it"
                )


def _describe(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{list(tensor.shape)} {tensor.dtype}"
