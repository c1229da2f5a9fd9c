"""The packed folder of ``docs/format.md``: how it is written, and how it is opened.

The data are mapped, not read: opening costs the same for any size.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from enum import Enum
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from turbosparse.base.errors import TurboSparseError
from turbosparse.base.folders import new_file, read_config
from turbosparse.hf import families
from turbosparse.hf.activations import WITHOUT_ZEROS, Activation
from turbosparse.ops.predictor import PackedPredictor, Predictor
from turbosparse.ops.rows import BLOCK, row_bytes, sign_bytes

VERSION = 1
PAGE = 4096
SHARD_BYTES = 4 << 30
_FILE_NAME = re.compile(r"model-\d{5,9}-of-\d{5,9}\.safetensors", re.ASCII)
_DTYPES: dict[str, np.dtype[Any]] = {
    "U8": np.dtype("u1"),
    "F32": np.dtype("<f4"),
    "I32": np.dtype("<i4"),
}


class Fault(Enum):
    """Every way in which a packed folder can be wrong."""

    NOT_PACKED = "is no packed folder; make one with `turbosparse pack`"
    VERSION = "has another format version; pack the model again with this version of turbosparse"
    HEADER = "has a damaged turbosparse block in config.json; pack the model again"
    FILE_MISSING = "lacks a weight file; copy the folder again"
    FILE_SIZE = "has a weight file of the wrong size; copy the folder again"
    FILE_HEADER = "has a weight file with a damaged header; copy the folder again"
    TENSOR_MISSING = "lacks a tensor that config.json calls for; pack the model again"
    TENSOR_UNKNOWN = "holds a tensor that config.json does not call for; pack the model again"
    TENSOR_SHAPE = "holds a tensor of the wrong type or shape; pack the model again"
    ALIGNMENT = "holds a tensor off the page boundary; pack the model again"
    NEURON_ORDER = "holds a neuron order that is no permutation; pack the model again"
    CHECKSUM = "has a weight file with changed bytes; copy the folder again"


class FormatError(TurboSparseError):
    """A packed folder that cannot be used; `fault` says why."""

    def __init__(self, folder: Path, fault: Fault, detail: str = ""):
        super().__init__(f"{folder} {fault.value}" + (f" ({detail})" if detail else ""))
        self.fault = fault


class FFN(BaseModel):
    """The record that describes a model's feed-forward."""

    model_config = ConfigDict(extra="forbid")
    activation: Activation
    predictor: Predictor | None = None

    @model_validator(mode="after")
    def _has_zeros_to_predict(self) -> Self:
        if self.predictor and self.activation in WITHOUT_ZEROS:
            raise ValueError(f"{self.activation} has no zeros to predict")
        return self


class File(BaseModel):
    model_config = ConfigDict(extra="forbid")
    bytes: int
    sha256: str


class Profile(BaseModel):
    """What `analyse` saw of this model: per layer and expert, ratios and the tokens that came."""

    model_config = ConfigDict(extra="forbid")
    tokens: int
    nats_per_token: float
    active: list[list[float]]
    gate_positive: list[list[float]]
    expert_tokens: list[list[int]]

    def per_layer(self, ratios: list[list[float]]) -> list[float]:
        """The mean over a layer's experts, each weighted by its tokens."""
        return [
            sum(r * n for r, n in zip(ratio, tokens, strict=True)) / max(1, sum(tokens))
            for ratio, tokens in zip(ratios, self.expert_tokens, strict=True)
        ]


class Header(BaseModel):
    """The ``"turbosparse"`` block of a packed ``config.json``."""

    model_config = ConfigDict(extra="forbid")
    format_version: int
    quant: Literal["f16", "q8", "q4"]
    ffn: FFN
    neuron_order: Literal["hot_first", "model"]
    source: str
    packed_by: str
    profile: Profile | None = None
    files: dict[str, File]


class Spec(NamedTuple):
    """Type and shape of one tensor in a packed folder, and its role.

    Roles are those of the tables of `families`, and ``ffn``, ``neuron_order``, ``predictor``.
    """

    dtype: str
    shape: tuple[int, ...]
    role: str

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * _DTYPES[self.dtype].itemsize


def ffn_prefix(layer: int | None, expert: int | None) -> str:
    return f"model.layers.{layer}." + ("" if expert is None else f"experts.{expert}.")


def layout(config: Any, quant: str, predictor: Predictor | None = None) -> dict[str, Spec]:
    """Every tensor of a packed model, in the order in which a decoder reads them."""
    plan: dict[str, Spec] = {}
    for name, row, layer, expert, shape in families.tensors(config):
        if row.packed == "matrix":
            plan[name] = Spec("U8", (shape[0], row_bytes(quant, shape[1])), row.role)
        elif row.packed == "float":
            plan[name] = Spec("F32", shape, row.role)
        elif row.role == "gate":  # up and down stand in the same rows
            prefix, neurons = ffn_prefix(layer, expert), config.intermediate_size
            rows = 3 * neurons, row_bytes(quant, config.hidden_size)
            plan[f"{prefix}ffn"] = Spec("U8", rows, "ffn")
            plan[f"{prefix}neuron_order"] = Spec("I32", (neurons,), "neuron_order")
            if predictor:
                own = _predictor_layout(config, predictor, layer or 0, expert or 0)
                plan |= {
                    f"{prefix}predictor.{part}": Spec("U8", shape, "predictor")
                    for part, shape in own.items()
                }
    return plan


def _predictor_layout(
    config: Any, predictor: Predictor, layer: int, expert: int
) -> dict[str, tuple[int, int]]:
    hidden, neurons = config.hidden_size, config.intermediate_size
    if predictor.ranks is None:
        return {"signs": (neurons, 2 * sign_bytes(hidden))}
    quant, rank = str(predictor.quant), predictor.ranks[layer][expert]
    return {"fc1": (rank, row_bytes(quant, hidden)), "fc2": (neurons, row_bytes(quant, rank))}


def write_weights(
    folder: Path, plan: dict[str, Spec], tensors: Iterator[tuple[str, NDArray[Any]]]
) -> dict[str, File]:
    """Stream `tensors`, in the order of `plan`, into weight files; one is held at a time."""
    shards = _split(plan)
    files: dict[str, File] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        digest = hashlib.sha256()
        with new_file(folder / name) as work:
            with work.open("wb") as file:
                for chunk in _shard_bytes(shard, tensors):
                    digest.update(chunk)
                    file.write(chunk)
            files[name] = File(bytes=work.stat().st_size, sha256=digest.hexdigest())
    return files


def _split(plan: dict[str, Spec]) -> list[dict[str, Spec]]:
    shards: list[dict[str, Spec]] = [{}]
    for name, spec in plan.items():
        if shards[-1] and sum(s.nbytes for s in shards[-1].values()) + spec.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = spec
    return shards


def _shard_bytes(
    shard: dict[str, Spec], tensors: Iterator[tuple[str, NDArray[Any]]]
) -> Iterator[bytes | memoryview]:
    header: dict[str, Any] = {"__metadata__": {"format": "turbosparse"}}
    offset = 0
    for number, (name, spec) in enumerate(shard.items()):
        for entry, dtype, shape, size in (
            (name, spec.dtype, spec.shape, spec.nbytes),
            (f"pad.{number}", "U8", (-spec.nbytes % PAGE,), -spec.nbytes % PAGE),
        ):
            if size:
                span = [offset, offset + size]
                header[entry] = {"dtype": dtype, "shape": list(shape), "data_offsets": span}
                offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % PAGE)
    yield len(text).to_bytes(8, "little")
    yield text
    for name, spec in shard.items():
        found, array = next(tensors)
        assert (found, array.shape) == (name, spec.shape), (
            f"{found} {array.shape} came for {name} {spec}"
        )
        array = np.ascontiguousarray(array, dtype=_DTYPES[spec.dtype])
        yield array.data.cast("B")
        yield bytes(-spec.nbytes % PAGE)


class Packed:
    """An open packed folder; `tensors` are read-only views of the mapped files, by name.

    Raises:
        FormatError: the folder is damaged or of another version; the message names what and where.
    """

    def __init__(self, folder: str | Path):
        from turbosparse.hf.load import load_config

        self.folder = Path(folder).expanduser()
        raw = read_config(self.folder)
        self.header = _read_header(self.folder, raw)
        self.config = load_config(self.folder)
        predictor = self.header.ffn.predictor
        _check_ranks(self.folder, predictor, self.config)
        self.plan = layout(self.config, self.header.quant, predictor)
        self.tensors = _map_files(self.folder, self.header, self.plan)
        _check_orders(self.folder, self.plan, self.tensors)

    @property
    def quant(self) -> str:
        return self.header.quant

    @property
    def activation(self) -> str:
        return self.header.ffn.activation

    def predictor(self, prefix: str) -> PackedPredictor | None:
        """That of the feed-forward with this `ffn_prefix`; None if the folder holds none."""
        about = self.header.ffn.predictor
        if about is None:
            return None
        parts = ("signs",) if about.kind == "sign" else ("fc1", "fc2")
        found = {part: self.tensors[f"{prefix}predictor.{part}"] for part in parts}
        return PackedPredictor(about, found)

    def verify_checksums(self) -> None:
        """Read every byte and compare it with what `pack` wrote."""
        for name, file in self.header.files.items():
            with (self.folder / name).open("rb") as data:
                if hashlib.file_digest(data, "sha256").hexdigest() != file.sha256:
                    raise FormatError(self.folder, Fault.CHECKSUM, name)


def _read_header(folder: Path, raw: dict[str, Any]) -> Header:
    block = raw.get("turbosparse")
    if not isinstance(block, dict) or "format_version" not in block:
        raise FormatError(folder, Fault.NOT_PACKED)
    if block["format_version"] != VERSION:
        raise FormatError(folder, Fault.VERSION, f"{block['format_version']!r}, this is {VERSION}")
    try:
        return Header.model_validate(block)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise FormatError(folder, Fault.HEADER, f"{where}: {first['msg']}") from error


def _check_ranks(folder: Path, predictor: Predictor | None, config: Any) -> None:
    if predictor is None or predictor.ranks is None:
        return
    shape = [max(1, families.experts(config))] * config.num_hidden_layers
    step = 1 if predictor.quant == "f16" else BLOCK
    sound = all(rank > 0 and rank % step == 0 for layer in predictor.ranks for rank in layer)
    if not sound or [len(layer) for layer in predictor.ranks] != shape:
        detail = f"ffn.predictor.ranks: not a multiple of {step} for each layer and expert"
        raise FormatError(folder, Fault.HEADER, detail)


def _map_files(folder: Path, header: Header, plan: dict[str, Spec]) -> dict[str, NDArray[Any]]:
    tensors: dict[str, NDArray[Any]] = {}
    for name, file in header.files.items():
        if not _FILE_NAME.fullmatch(name):
            raise FormatError(folder, Fault.HEADER, f"files: {name!r:.80} is no weight file's name")
        path = folder / name
        if not path.is_file():
            raise FormatError(folder, Fault.FILE_MISSING, name)
        size = path.stat().st_size
        if size != file.bytes or size < PAGE:
            raise FormatError(folder, Fault.FILE_SIZE, f"{name}: {size} bytes, not {file.bytes}")
        data = np.memmap(path, mode="r", dtype=np.uint8)
        for tensor, dtype, shape, start, end in _read_entries(folder, name, data):
            if tensor.startswith("pad."):
                continue
            spec = plan.get(tensor)
            if spec is None:
                raise FormatError(folder, Fault.TENSOR_UNKNOWN, tensor)
            if (dtype, shape) != spec[:2] or end - start != spec.nbytes:
                asked = f"{spec.dtype} {list(spec.shape)}"
                raise FormatError(
                    folder, Fault.TENSOR_SHAPE, f"{tensor}: {dtype} {list(shape)}, not {asked}"
                )
            if start % PAGE:
                raise FormatError(folder, Fault.ALIGNMENT, f"{tensor} at byte {start}")
            tensors[tensor] = data[start:end].view(_DTYPES[dtype]).reshape(spec.shape)
    missing = [name for name in plan if name not in tensors]
    if missing:
        raise FormatError(folder, Fault.TENSOR_MISSING, missing[0])
    return tensors


def _read_entries(
    folder: Path, name: str, data: NDArray[np.uint8]
) -> Iterator[tuple[str, str, tuple[int, ...], int, int]]:
    """Yield (tensor, dtype, shape, start, end) of a weight file, spans checked against its size."""
    length = int.from_bytes(data[:8].tobytes(), "little")
    if length > len(data) - 8:
        raise FormatError(folder, Fault.FILE_HEADER, f"{name}: header of {length} bytes")
    begin = 8 + length
    try:
        entries = json.loads(data[8:begin].tobytes())
        entries.pop("__metadata__", None)
        for tensor, entry in entries.items():
            first, last = entry["data_offsets"]
            start, end = begin + first, begin + last
            if not (type(first) is type(last) is int and 0 <= first <= last and end <= len(data)):
                raise FormatError(
                    folder, Fault.FILE_HEADER, f"{name}: {tensor} spans {first}…{last}"
                )
            yield tensor, entry["dtype"], tuple(entry["shape"]), start, end
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(folder, Fault.FILE_HEADER, f"{name}: {error!r:.80}") from error


def _check_orders(folder: Path, plan: dict[str, Spec], tensors: dict[str, NDArray[Any]]) -> None:
    for name, order in tensors.items():
        if plan[name].role == "neuron_order":
            seen = np.zeros(len(order), dtype=bool)
            seen[order[(order >= 0) & (order < len(order))]] = True
            if not seen.all():
                raise FormatError(folder, Fault.NEURON_ORDER, name)
