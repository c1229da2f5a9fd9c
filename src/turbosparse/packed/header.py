"""What a packed folder says of itself: the ``"turbosparse"`` block of its config.json, checked."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from turbosparse.base.errors import TurboSparseError
from turbosparse.hf.activations import ACTIVATIONS, WITHOUT_ZEROS, Activation
from turbosparse.ops.predictor import Predictor
from turbosparse.ops.rows import QUANTS, Quant

VERSION: Final = 3
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]


class Fault(Enum):
    """Every way in which a packed folder can be wrong."""

    NOT_PACKED = "is not a packed folder; make one with `turbosparse pack`"
    VERSION = "has another format version; pack the model again with this version of turbosparse"
    HEADER = "has a damaged turbosparse block in config.json; pack the model again"
    ACTIVATION = "names one activation in its turbosparse block and another; pack the model again"
    PROFILE = "has the profile of another model; pack the model again"
    FILE_MISSING = "lacks a weight file; copy the folder again"
    FILE_SIZE = "has a weight file of the wrong size; copy the folder again"
    FILE_CHANGED = "has a weight file that was changed while it was open; open the folder again"
    FILE_HEADER = "has a weight file with a damaged header; copy the folder again"
    FILE_LAYOUT = "has a weight file with overlapping tensors or holes; pack the model again"
    TENSOR_MISSING = "lacks a tensor that config.json calls for; pack the model again"
    TENSOR_UNKNOWN = "holds a tensor that config.json does not call for; pack the model again"
    TENSOR_TWICE = "holds a tensor twice; pack the model again"
    TENSOR_SHAPE = "holds a tensor of the wrong type or shape; pack the model again"
    ALIGNMENT = "holds a tensor off the page boundary; pack the model again"
    NEURON_ORDER = "holds a neuron order that is not a permutation; pack the model again"
    CHECKSUM = "has a weight file with changed bytes; copy the folder again"
    NOT_FINITE = "holds a weight that is NaN or infinite; pack a sound model again"


class FormatError(TurboSparseError):
    """A packed folder that cannot be used; `fault` says why."""

    def __init__(self, folder: Path, fault: Fault, detail: str = ""):
        super().__init__(f"{folder} {fault.value}" + (f" ({detail})" if detail else ""))
        self.fault = fault


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class QuantMap(_Record):
    """The quantisation of each kind of matrix; that of a predictor is in its own record."""

    embedding: Quant
    q: Quant
    k: Quant
    v: Quant
    o: Quant
    head: Quant  # of a tied model the embedding's
    gate: Quant
    up: Quant
    down: Quant

    @classmethod
    def uniform(cls, quant: str) -> Self:
        return cls.model_validate(dict.fromkeys(cls.model_fields, quant))

    @classmethod
    def default(cls, quant: str, overrides: dict[str, str], *, same: list[tuple[str, str]]) -> Self:
        """What `pack` writes: `overrides` by kind, or for the groups ``attention`` and ``ffn``.

        The two kinds of a pair in `same` are one matrix (`format.same_matrices`).
        Beside q4 and q4_0 the embedding and the head are q8: with q4_0 SmolLM2 of 135 M parameters
        then loses 24 % of perplexity instead of 33 % (20,000 tokens of Wikipedia).
        """
        ends = dict.fromkeys(("embedding", "head"), "q8" if quant in ("q4", "q4_0") else quant)
        kinds = dict.fromkeys(cls.model_fields, quant) | ends
        for name, kind in sorted(overrides.items(), key=lambda item: item[0] not in _GROUPS):
            if name not in kinds and name not in _GROUPS:
                known = ", ".join((*_GROUPS, *kinds))
                raise TurboSparseError(f"quant map: {name!r} is unknown; use {known}")
            if kind not in QUANTS:
                raise TurboSparseError(
                    f"quant map: {name}={kind} is unknown; use {', '.join(QUANTS)}"
                )
            kinds |= dict.fromkeys(_GROUPS.get(name, (name,)), kind)
        for pair in same:
            given = {overrides[kind] for kind in pair if kind in overrides}
            if len(given) > 1:
                raise TurboSparseError(
                    f"quant map: the {pair[1]} of this model is its {pair[0]}; give them one quant"
                )
            kinds |= dict.fromkeys(pair, min(given, default=kinds[pair[0]]))
        return cls.model_validate(kinds)

    def of(self, kinds: Iterable[str]) -> tuple[str, ...]:
        return tuple(getattr(self, kind) for kind in kinds)

    def __str__(self) -> str:
        """The quantisation of the gates, and what differs from it."""
        other: dict[str, list[str]] = {}
        for name, quant in self:
            if quant != self.gate:
                other.setdefault(quant, []).append(name)
        return ", ".join([self.gate, *(f"{' '.join(n)} {q}" for q, n in other.items())])


_GROUPS = {"attention": ("q", "k", "v", "o"), "ffn": ("gate", "up", "down")}


class FFN(_Record):
    """The record that describes a model's feed-forward."""

    activation: Activation
    # a gate at most this large is inactive (FATReLU)
    threshold: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    predictor: Predictor | None = None

    @model_validator(mode="after")
    def _has_zeros(self) -> Self:
        if self.predictor and self.activation in WITHOUT_ZEROS:
            raise ValueError(f"{self.activation} has no zeros to predict")
        if self.threshold and not ACTIVATIONS[self.activation].cuts:
            raise ValueError(f"{self.activation} has no threshold")
        return self


class File(_Record):
    bytes: Count
    sha256: str


class Profile(_Record):
    """What `analyse` saw of this model: per layer and expert, ratios and the tokens that came."""

    tokens: Count
    nats_per_token: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    active: list[list[Share]]
    gate_positive: list[list[Share]]
    expert_tokens: list[list[Count]]
    # of the neurons of a layer, the share that so many neighbouring tokens need together
    windows: dict[Annotated[int, Field(ge=1, strict=False)], Share] = {}

    def fits(self, layers: int, experts: int) -> bool:
        """Whether it is of a model of this many layers with this many feed-forwards in each."""
        tables = (self.active, self.gate_positive, self.expert_tokens)
        return all([len(row) for row in table] == [experts] * layers for table in tables)

    def per_layer(self, ratios: list[list[float]]) -> list[float]:
        """The mean over a layer's experts, each weighted by its tokens."""
        return [
            sum(r * n for r, n in zip(ratio, tokens, strict=True)) / max(1, sum(tokens))
            for ratio, tokens in zip(ratios, self.expert_tokens, strict=True)
        ]


class Header(_Record):
    """The ``"turbosparse"`` block of a packed ``config.json``."""

    format_version: Literal[3]
    quant: QuantMap
    cluster_neurons: int  # neurons whose pairs are read together from disk
    ffn: FFN
    neuron_order: Literal["hot_first", "model"]
    bundled: bool = False  # gate, up and down of a neuron lie together, for reading from disk
    source: str
    packed_by: str
    profile: Profile | None = None
    files: dict[str, File]

    @property
    def ffn_quants(self) -> tuple[str, ...]:
        """Of the parts of a feed-forward that the activation reads."""
        return self.quant.of(ACTIVATIONS[self.ffn.activation].parts)

    @classmethod
    def read(cls, folder: Path, config: dict[str, Any]) -> Self:
        """Check the block of a config.json.

        Raises:
            FormatError: there is none, or it is of another version or damaged.
        """
        block = config.get("turbosparse")
        if not isinstance(block, dict) or "format_version" not in block:
            raise FormatError(folder, Fault.NOT_PACKED)
        if block["format_version"] != VERSION:
            detail = f"{block['format_version']!r:.80}, this is {VERSION}"
            raise FormatError(folder, Fault.VERSION, detail)
        try:
            return cls.model_validate(block)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise FormatError(folder, Fault.HEADER, f"{where}: {first['msg']}") from error
