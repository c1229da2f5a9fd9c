"""What `analyse` counts of a model's neurons, and the file that it stands in (docs/format.md)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from turbosparse.base.errors import TurboSparseError
from turbosparse.base.folders import new_file
from turbosparse.hf import families
from turbosparse.hf.activations import WITHOUT_ZEROS
from turbosparse.hf.load import activation_of
from turbosparse.packed.header import Profile

# what the matrices of a role read, by its name in `Stats.squares`
READS = {"q": "qkv", "k": "qkv", "v": "qkv", "o": "o", "gate": "ffn", "up": "ffn", "head": "head"}
_COUNTS = ("active", "gate_positive", "tokens")
# not *.safetensors: loaders take every file of that name in a folder for weights
FILE = "stats.turbosparse"
VERSION: Literal[2] = 2

NEAR = (0.01, 0.03, 0.1)  # parts of a token's largest Combined
WINDOWS = (1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 64, 128, 256)  # neighbouring tokens of one text
BATCHES = (2, 4, 8, 16, 32)  # tokens that stand far apart
POSITIONS = 12  # 0, 1, 2–3, 4–7, …; the last bin is open
SHARES = 101  # percent of the neurons
VALUES = ("gate", "up", "combined")
_SIZES = [2 ** (half / 2) for half in range(-20, 13)]
# bins of gate, up and Combined: bin i is what lies above edge i − 1 and not above edge i; zero has
# its own
EDGES = (*(-size for size in reversed(_SIZES)), -1e-30, 0.0, *_SIZES)


def sums(layers: int, experts: int, neurons: int) -> dict[str, Tensor]:
    """What is counted besides each neuron, at zero; see docs/format.md."""
    shapes = {
        "signs": (layers, experts, 2),
        "shares": (layers, experts, SHARES),
        "positions": (layers, POSITIONS, 2),
        "unions": (layers, len(WINDOWS)),
        "windows": (len(WINDOWS),),
        "batches": (layers, len(BATCHES)),
        "draws": (len(BATCHES),),
        "overlap": (layers, 2),
        "values": (layers, len(VALUES), len(EDGES) + 1),
        "near": (layers, len(NEAR)),
    }
    counts = {name: torch.zeros(shape, dtype=torch.int64) for name, shape in shapes.items()}
    return counts | {
        "entropy": torch.zeros(layers, 2, dtype=torch.float64),
        "mass": torch.zeros(layers, experts, neurons, dtype=torch.float64),
    }


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Point(_Record):
    """A place on a curve: of the neurons in use, this share is kept."""

    kept: float
    perplexity: float
    setting: float  # the share asked for, the threshold, or the CETT


class Curves(_Record):
    """Perplexity against kept neurons; see `analysis.curves`."""

    tokens: int
    perplexity: float  # of the model as it is
    kept: float
    methods: dict[str, list[Point]]
    rise: float  # percent that CETT-PPL-p % allows
    cett: Point | None  # where the perplexity has risen so far; None: it never does


class _About(_Record):
    """The JSON of a statistics file."""

    version: Literal[2]
    nats: dict[str, float]
    predicted: dict[str, int]
    about: dict[str, str]
    words: list[str]
    curves: Curves | None


_ABOUT = tuple(name for name in _About.model_fields if name != "version")


@dataclass
class Stats:
    """Counts over the predicted tokens of a corpus; E is 1 for a dense model.

    Shapes: `active` and `gate_positive` ``[layers, E, neurons]``, `tokens` ``[layers, E]`` (tokens
    that reached the expert), all int64. All tensors but `sample` are sums: the statistics of two
    runs add up.
    """

    active: Tensor
    gate_positive: Tensor
    tokens: Tensor
    nats: dict[str, float] = field(default_factory=dict)  # summed over the tokens of each corpus
    predicted: dict[str, int] = field(default_factory=dict)  # tokens of each corpus
    about: dict[str, str] = field(default_factory=dict)  # model, activation
    # of what matrices read, summed over the tokens: qkv, o and ffn ``[layers, cols]``, head
    # ``[1, cols]``
    squares: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)  # see `sums`
    # of each corpus: active neurons, and tokens, ``[2, layers, E]``
    corpora: dict[str, Tensor] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)  # the tokens of a sample text
    # share of the neurons in use in the active set at each of these tokens, ``[layers, words]``
    sample: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    curves: Curves | None = None

    def __post_init__(self) -> None:
        self.sums = self.sums or sums(*self.active.shape)
        if not self.words:
            self.sample = torch.zeros(len(self.active), 0)

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
        about = {"activation": activation_of(config)}
        return cls(zeros, zeros.clone(), tokens, about=about, squares=squares)

    def __add__(self, other: Stats) -> Stats:
        """Those of two runs of one model together; sample and curves are the first's, if any.

        Raises:
            TurboSparseError: they are of models of another shape or activation.
        """
        if fault := _difference(self._tensors(), other._tensors()):
            raise TurboSparseError(f"statistics of two different models do not add up: {fault}")
        if self.about.get("activation") != other.about.get("activation"):
            raise TurboSparseError(
                f"statistics of a model run as {self.about.get('activation')} and as "
                f"{other.about.get('activation')} do not add up"
            )
        first = self if self.words else other
        added: dict[str, Any] = {
            name: getattr(self, name) + getattr(other, name) for name in _COUNTS
        } | {
            name: _added(getattr(self, name), getattr(other, name))
            for name in ("nats", "predicted", "squares", "sums", "corpora")
        }
        return replace(
            self,
            **added,
            about=other.about | self.about,
            words=first.words,
            sample=first.sample,
            curves=self.curves or other.curves,
        )

    def importance(self, role: str, layer: int | None) -> Tensor | None:
        """How much each column of a matrix matters, ``[cols]``: the squares that it met.

        None where nothing is known, as of a packed down row, whose weights all meet the same
        Combined.
        """
        kind = READS.get(role)
        return self.squares[kind][layer or 0] if kind else None

    def active_ratio(self) -> Tensor:
        """Share of Combined entries that are not zero, ``[layers, E]`` float64."""
        return self._of_entries(self.active.sum(-1))

    def gate_ratio(self) -> Tensor:
        """Share of gate pre-activations above zero, ``[layers, E]`` float64."""
        return self._of_entries(self.gate_positive.sum(-1))

    def _of_entries(self, counts: Tensor) -> Tensor:
        return counts / (self.tokens.clamp(min=1) * self.active.shape[-1]).double()

    def per_layer(self, ratio: Tensor) -> Tensor:
        """Mean over the experts of a layer, each weighted by the tokens it saw, ``[layers]``."""
        return (ratio * self.tokens).sum(-1) / self.tokens.sum(-1).clamp(min=1)

    def activation_sparsity(self) -> float:
        """Share of exact zeros in Combined, mean over layers (in MoE: of the experts in use)."""
        return 1 - float(self.per_layer(self.active_ratio()).mean())

    @property
    def sparsity(self) -> dict[str, float]:
        """The activation sparsity of each corpus."""
        neurons = self.active.shape[-1]
        return {
            corpus: 1 - float((active.sum(-1) / (tokens.sum(-1) * neurons)).mean())
            for corpus, (active, tokens) in self.corpora.items()
        }

    @property
    def near_zero(self) -> dict[str, float]:
        """Share of Combined below this part of a token's largest; of activations without zeros."""
        if self.about.get("activation") not in WITHOUT_ZEROS:
            return {}
        entries = max(1, int(self.tokens.sum()) * self.active.shape[-1])
        shares = self.sums["near"].sum(0) / entries
        return {f"{part:g}": float(share) for part, share in zip(NEAR, shares, strict=True)}

    def together(self, kind: Literal["windows", "batches"]) -> dict[int, float]:
        """Share of a layer's neurons that some tokens need together, by their number.

        Mean over the layers. Of an ungathered number, as of longer texts than there were, nothing.
        """
        name, counts, sizes = {
            "windows": ("unions", "windows", WINDOWS),
            "batches": ("batches", "draws", BATCHES),
        }[kind]
        neurons = self.active[0].numel()
        shares = self.sums[name].double().mean(0) / (self.sums[counts] * neurons)
        return {
            size: float(share)
            for size, share, count in zip(sizes, shares, self.sums[counts], strict=True)
            if count
        }

    def overlap(self) -> list[float]:
        """Of the neurons of a token, the share that the token before has too, of each layer."""
        common, size = self.sums["overlap"].unbind(-1)
        return _floats(common / size.clamp(min=1))

    def signs_ratio(self) -> Tensor:
        """Share of up above zero, and of gate and up both, ``[2, layers, E]`` float64."""
        return self._of_entries(self.sums["signs"].movedim(-1, 0))

    def router_entropy(self) -> list[float]:
        """Of the router's shares, in nats, of each layer; 0 in a dense model."""
        entropy, tokens = self.sums["entropy"].unbind(-1)
        return _floats(entropy / tokens.clamp(min=1))

    def quantiles(self, *at: float) -> Tensor:
        """Of the size of a token's active set in an FFN, as its share, ``[layers, E, at]``."""
        shares = self.sums["shares"].cumsum(-1)
        places = [(shares < q * shares[..., -1:]).sum(-1) for q in at]
        return torch.stack(places, -1) / (SHARES - 1)

    def nats_per_token(self, corpus: str | None = None) -> float:
        """Cross-entropy in nats per token, of one corpus or of all."""
        chosen = [corpus] if corpus else list(self.nats)
        return sum(self.nats[c] for c in chosen) / max(1, sum(self.predicted[c] for c in chosen))

    def perplexity(self, corpus: str | None = None) -> float:
        """``exp`` of the nats per token; infinite beyond what a float holds."""
        nats = self.nats_per_token(corpus)
        return math.exp(nats) if nats < 709 else math.inf

    def heat(self) -> Tensor:
        """How much each neuron does, the hottest first, ``[layers, E, neurons]`` float64.

        Its activations; where all are active, the squares of its Combined.
        """
        dense = self.about.get("activation") in WITHOUT_ZEROS
        heat = self.sums["mass"] if dense else self.active.double()
        return heat.sort(-1, descending=True).values

    def hot_share(self, carried: float = 0.8) -> list[list[float]]:
        """Smallest share of neurons that makes up `carried` of the heat, [layer][expert]."""
        counts = self.heat().cumsum(-1)
        enough = counts >= carried * counts[..., -1:]
        hot: list[list[float]] = ((1 + (~enough).sum(-1)) / self.active.shape[-1]).tolist()
        return hot

    def save(self, path: Path) -> None:
        from safetensors.torch import save_file

        fields = {name: getattr(self, name) for name in _ABOUT}
        text = _About(version=VERSION, **fields).model_dump_json()
        corpora = {f"corpora.{name}": counts for name, counts in self.corpora.items()}
        tensors = self._tensors() | corpora | {"sample": self.sample}
        with new_file(path) as work:
            save_file(tensors, work, metadata={"turbosparse": text})

    def _tensors(self) -> dict[str, Tensor]:
        """The sums that every model of this shape has, by their names in the file."""
        return (
            {name: getattr(self, name) for name in _COUNTS}
            | {f"squares.{name}": tensor for name, tensor in self.squares.items()}
            | {f"sums.{name}": tensor for name, tensor in self.sums.items()}
        )

    @classmethod
    def load(cls, path: Path) -> Stats:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                about = _About.model_validate_json(file.metadata()["turbosparse"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls._of(about, tensors)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
            raise TurboSparseError(
                f"{path} is not a statistics file of version {VERSION} ({reason}); make one with "
                "`turbosparse analyse`"
            ) from error

    @classmethod
    def _of(cls, about: _About, tensors: dict[str, Tensor]) -> Stats:
        """Those that stand in a file.

        Raises:
            KeyError, ValueError: a tensor is missing, unknown, or not of the shape of the others.
        """
        fields: dict[str, Any] = {name: getattr(about, name) for name in _ABOUT}
        fields |= {name: tensors.pop(name) for name in (*_COUNTS, "sample")}
        fields |= {"squares": {}, "sums": {}, "corpora": {}}
        for name, tensor in tensors.items():
            group, _, key = name.partition(".")
            fields[group][key] = tensor
        stats = cls(**fields)
        active, tokens = stats.active, stats.active[..., 0]
        expected = cls(active, active, tokens, squares=stats.squares)
        fault = _difference(stats._tensors(), expected._tensors())
        fault = fault or _difference(
            stats.corpora | {"sample": stats.sample},
            {name: torch.stack([tokens, tokens]) for name in about.predicted}
            | {"sample": torch.zeros(len(active), len(about.words))},
        )
        if fault:
            raise ValueError(fault)
        return stats

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
            windows=self.together("windows"),
        )

    def check(self, config: Any) -> None:
        """Raise unless these statistics are of a model of this shape."""
        if fault := _difference(self._tensors(), Stats.empty(config)._tensors()):
            raise TurboSparseError(
                f"the statistics are of another model: {fault}; run `turbosparse analyse` on it"
            )


def _difference(own: dict[str, Tensor], needed: dict[str, Tensor]) -> str | None:
    """The first tensor that is not of the name, shape and type that is needed, in words."""
    for name in own | needed:
        mine, expected = (_describe(tensors.get(name)) for tensors in (own, needed))
        if mine != expected:
            return f"{name} is {mine}, this model needs {expected}"
    return None


def _describe(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{list(tensor.shape)} {tensor.dtype}"


def _floats(values: Tensor) -> list[float]:
    floats: list[float] = values.tolist()
    return floats


def _added(own: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Values of the same name added up."""
    both = own.keys() & other.keys()
    return own | other | {name: own[name] + other[name] for name in both}
