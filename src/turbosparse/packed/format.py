"""The packed folder of ``docs/format.md``: what stands in it, and how it is opened.

The data are mapped, not read: opening costs the same for any size.
"""

from __future__ import annotations

from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turbosparse.base.folders import local_path, read_config
from turbosparse.hf import families
from turbosparse.hf.activations import ACTIVATIONS
from turbosparse.hf.config import parse
from turbosparse.hf.load import activation_of, threshold_of
from turbosparse.ops.predictor import PackedPredictor, Predictor
from turbosparse.ops.rows import (
    BLOCK,
    FFNRows,
    bundle_bytes,
    finite_scales,
    row_bytes,
    sign_bytes,
)
from turbosparse.packed.files import PAGE, Spec, WeightFile, named_tensors, verify_checksums
from turbosparse.packed.header import Fault, FormatError, Header, QuantMap

CLUSTER_BYTES = 64 << 10  # the least that a read from flash should fetch


def ffn_prefix(layer: int | None, expert: int | None) -> str:
    return f"model.layers.{layer}." + ("" if expert is None else f"experts.{expert}.")


def layout(
    config: Any, quants: QuantMap, predictor: Predictor | None = None, *, bundled: bool = False
) -> dict[str, Spec]:
    """Every tensor of a packed model, in the order in which a decoder reads them."""
    plan: dict[str, Spec] = {}
    parts = ACTIVATIONS[activation_of(config)].parts
    kinds = quants.of(parts)
    for name, row, layer, expert, shape in families.tensors(config):
        if row.packed == "matrix":
            plan[name] = _matrix(row.role, shape, getattr(quants, row.role))
        elif row.packed == "float":
            plan[name] = Spec("F32", shape, row.role)
        elif row.role == parts[0]:  # the others are its pairs
            prefix, neurons = ffn_prefix(layer, expert), config.intermediate_size
            if bundled:
                size = bundle_bytes(config.hidden_size, kinds)
                plan[f"{prefix}bundles"] = Spec("U8", (neurons, size), "bundles")
            else:
                pair = pair_bytes(config.hidden_size, kinds)
                plan[f"{prefix}gate"] = _matrix("gate", shape, kinds[0])
                plan[f"{prefix}pairs"] = Spec("U8", (neurons, pair), "pairs")
            plan[f"{prefix}neuron_order"] = Spec("I32", (neurons,), "neuron_order")
            if predictor:
                own = _predictor_layout(config, predictor, layer or 0, expert or 0)
                plan |= {f"{prefix}predictor.{part}": spec for part, spec in own.items()}
    return plan


def _matrix(role: str, shape: tuple[int, ...], quant: str) -> Spec:
    return Spec("U8", (shape[0], row_bytes(quant, shape[1])), role, quant, shape[1])


def _predictor_layout(
    config: Any, predictor: Predictor, layer: int, expert: int
) -> dict[str, Spec]:
    hidden, neurons = config.hidden_size, config.intermediate_size
    if predictor.ranks is None:
        rows = len(ACTIVATIONS[activation_of(config)].zero_by)
        return {"signs": Spec("U8", (neurons, rows * sign_bytes(hidden)), "predictor")}
    quant, rank = str(predictor.quant), predictor.ranks[layer][expert]
    return {
        "fc1": _matrix("predictor", (rank, hidden), quant),
        "fc2": _matrix("predictor", (neurons, rank), quant),
    }


def same_matrices(config: Any) -> list[tuple[str, str]]:
    """Kinds of a `QuantMap` that are one matrix in this model."""
    tied = [("embedding", "head")] if config.tie_word_embeddings else []
    gated = ACTIVATIONS[activation_of(config)].gated
    return tied if gated else [*tied, ("up", "gate")]


def pair_bytes(hidden: int, quants: tuple[str, ...]) -> int:
    """The rows of a neuron behind that of its gate; `quants` are of all parts."""
    return sum(row_bytes(quant, hidden) for quant in quants[1:])


def cluster_neurons(hidden: int, quants: tuple[str, ...]) -> int:
    """The fewest neighbouring neurons whose pairs are whole pages and at least `CLUSTER_BYTES`."""
    pair = pair_bytes(hidden, quants)
    unit = PAGE // gcd(PAGE, pair)
    return unit * -(-CLUSTER_BYTES // (unit * pair))


class Packed:
    """An open packed folder; `tensors` are read-only views of the mapped files, by name.

    Raises:
        FormatError: the folder is damaged or of another version; the message names what and where.
    """

    def __init__(self, folder: str | Path):
        self.folder = local_path(folder)
        raw = read_config(self.folder)
        self.header = Header.read(self.folder, raw)
        self.config = parse(raw, self.folder / "config.json")
        _check_header(self.folder, self.header, self.config)
        header = self.header
        self.plan = layout(self.config, header.quant, header.ffn.predictor, bundled=header.bundled)
        named = self.header.files.items()
        self.files = [WeightFile(self.folder, name, file) for name, file in named]
        self.tensors = named_tensors(self.folder, self.files, self.plan)
        _check_orders(self.folder, self.plan, self.tensors)

    @property
    def quant(self) -> str:
        return str(self.header.quant)

    @property
    def activation(self) -> str:
        return self.header.ffn.activation

    def ffn(self, prefix: str) -> FFNRows:
        """The rows of the feed-forward with this `ffn_prefix`."""
        about = self.config.hidden_size, self.header.ffn_quants
        if self.header.bundled:
            return FFNRows.of_bundles(self.tensors[f"{prefix}bundles"], *about)
        return FFNRows(self.tensors[f"{prefix}gate"], self.tensors[f"{prefix}pairs"], *about)

    def norm(
        self, role: str, layer: int | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Weight and bias of a LayerNorm, or weight and None of an RMSNorm.

        What stands in a folder is that of LayerNorm1P, whose weight is less by one.
        """
        name = families.table(self.config).name
        weight, bias = self.tensors[name(role, layer)], f"{role}.bias"
        if families.table(self.config).row(bias) is None:
            return weight, None
        return weight + np.float32(1), self.tensors[name(bias, layer)]

    def place(self, name: str) -> tuple[WeightFile, int]:
        """The file of a tensor that was not replaced, and its first byte there."""
        at = self.tensors[name].ctypes.data
        for file in self.files:
            if 0 <= (offset := at - file.data.ctypes.data) < file.data.nbytes:
                return file, offset
        raise AssertionError(f"{name} is not in a file")

    def predictor(self, prefix: str) -> PackedPredictor | None:
        """That of the feed-forward with this `ffn_prefix`; None if the folder holds none."""
        about = self.header.ffn.predictor
        if about is None:
            return None
        parts = ("signs",) if about.kind == "sign" else ("fc1", "fc2")
        found = {part: self.tensors[f"{prefix}predictor.{part}"] for part in parts}
        layer, *expert = (int(part) for part in prefix.split(".") if part.isdecimal())
        return PackedPredictor(about.of(layer, expert[0] if expert else None), found)

    def check_unchanged(self) -> None:
        """Raise FormatError if another program wrote into a weight file since it was opened."""
        for file in self.files:
            file.check_unchanged()

    def verify(self) -> None:
        """Read every byte: checksums, and whether every weight is finite."""
        self.check_unchanged()
        verify_checksums(self.folder, self.header.files)
        for name, tensor in self.tensors.items():
            self.check_unchanged()
            if not self._finite(name, tensor):
                raise FormatError(self.folder, Fault.NOT_FINITE, name)

    def _finite(self, name: str, tensor: NDArray[Any]) -> bool:
        spec = self.plan[name]
        if spec.role in ("pairs", "bundles"):
            rows = self.ffn(name.removesuffix(spec.role))
            parts = list(zip(rows.split(), rows.quants, strict=True))
            here = parts[spec.role == "pairs" :]
            return all(finite_scales(part, quant, rows.hidden) for part, quant in here)
        if spec.quant:
            return finite_scales(tensor, spec.quant, spec.cols)
        return spec.dtype != "F32" or bool(np.isfinite(tensor).all())


def _check_header(folder: Path, header: Header, config: Any) -> None:
    """Raise unless the block is of the model that the rest of config.json describes."""
    own = activation_of(config), threshold_of(config)
    if own != (said := (header.ffn.activation, header.ffn.threshold)):
        detail = "{} {:g}, not {} {:g}".format(*said, *own)
        raise FormatError(folder, Fault.ACTIVATION, detail)
    experts = max(1, families.experts(config))
    if header.profile and not header.profile.fits(config.num_hidden_layers, experts):
        detail = f"not of {config.num_hidden_layers} layers with {experts} feed-forwards each"
        raise FormatError(folder, Fault.PROFILE, detail)
    for one, other in same_matrices(config):
        if getattr(header.quant, one) != getattr(header.quant, other):
            raise FormatError(folder, Fault.HEADER, f"quant: the {other} is the {one}")
    cluster = cluster_neurons(config.hidden_size, header.ffn_quants)
    if header.cluster_neurons != cluster:
        detail = f"cluster_neurons: {header.cluster_neurons}, not {cluster}"
        raise FormatError(folder, Fault.HEADER, detail)
    if predictor := header.ffn.predictor:
        _check_each(folder, predictor, config)


def _check_each(folder: Path, predictor: Predictor, config: Any) -> None:
    """Raise unless what stands for each feed-forward is there for all of them."""
    shape = [max(1, families.experts(config))] * config.num_hidden_layers
    least = predictor.threshold
    if isinstance(least, list) and [len(layer) for layer in least] != shape:
        detail = "ffn.predictor.threshold: not one for each layer and expert"
        raise FormatError(folder, Fault.HEADER, detail)
    if predictor.ranks is None:
        return
    step = 1 if predictor.quant == "f16" else BLOCK
    sound = all(rank > 0 and rank % step == 0 for layer in predictor.ranks for rank in layer)
    if not sound or [len(layer) for layer in predictor.ranks] != shape:
        detail = f"ffn.predictor.ranks: not a multiple of {step} for each layer and expert"
        raise FormatError(folder, Fault.HEADER, detail)


def _check_orders(folder: Path, plan: dict[str, Spec], tensors: dict[str, NDArray[Any]]) -> None:
    for name, order in tensors.items():
        if plan[name].role == "neuron_order":
            seen = np.zeros(len(order), dtype=bool)
            seen[order[(order >= 0) & (order < len(order))]] = True
            if not seen.all():
                raise FormatError(folder, Fault.NEURON_ORDER, name)


def is_packed(folder: Path) -> bool:
    """Whether a folder says of itself that it is packed."""
    block = read_config(folder).get("turbosparse")
    return isinstance(block, dict) and "format_version" in block
