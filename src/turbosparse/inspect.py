"""Look into a packed folder: what it is, what its parts weigh, and whether its bytes are whole.

turbosparse inspect mistral-q4
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from turbosparse.base.folders import AnyPath
from turbosparse.hf import families
from turbosparse.hf.count import RULE, count_parameters
from turbosparse.ops.predictor import Predictor
from turbosparse.packed.format import Packed

# by role; what is not here is of the attention
_PARTS = {
    "gate": "feed-forward",
    "pairs": "feed-forward",
    "bundles": "feed-forward",
    "neuron_order": "feed-forward",
    "predictor": "predictors",
    **dict.fromkeys(("attention_norm", "ffn_norm", "norm", "router"), "norms and router"),
    **dict.fromkeys(("attention_norm.bias", "ffn_norm.bias", "norm.bias"), "norms and router"),
    **dict.fromkeys(("embedding", "head"), "embedding and head"),
}


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found; `parts` are bytes by kind of weight."""

    folder: str
    architecture: str
    quant: str
    activation: str
    threshold: float  # of the gates: FATReLU
    predictor: str | None
    neuron_order: str
    source: str
    packed_by: str
    layers: int
    experts: int
    neurons: int
    hidden: int
    context: int
    parameters: int
    activated_parameters: int | None  # None without a profile
    read_exact: int | None  # parameters that exact mode reads for one token
    activation_sparsity: float | None
    bytes: int
    parts: dict[str, int]

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table("", "", title=self.folder, show_header=False)
        experts = f" × {self.experts} experts" if self.experts else ""
        cut = f" with gates up to {self.threshold:g} cut" if self.threshold else ""
        table.add_row("model", f"{self.architecture}, {self.activation}{cut}, from {self.source}")
        table.add_row(
            "shape", f"{self.layers} layers{experts}, {self.neurons} neurons, hidden {self.hidden}"
        )
        table.add_row("context", f"{self.context} tokens")
        table.add_row(
            "packed", f"{self.quant}, neurons in {self.neuron_order} order, by {self.packed_by}"
        )
        if self.predictor:
            table.add_row("predictor", self.predictor)
        table.add_row("parameters", f"{self.parameters:,}")
        if self.activation_sparsity is not None:
            table.add_row("activated", f"{self.activated_parameters:,}\n{RULE}")
            table.add_row(
                "read in exact mode", f"{self.read_exact:,} (every gate, then what is needed)"
            )
            table.add_row(
                "activation sparsity", f"{self.activation_sparsity:.2%} on the profile's corpus"
            )
        for part, size in self.parts.items():
            table.add_row(f"bytes of {part}", f"{size:,} ({size / self.bytes:.1%})")
        table.add_row("bytes of all files", f"{self.bytes:,}")
        return table


def inspect(folder: AnyPath) -> Inspection:
    """Print what a packed folder holds.

    Parameters
    ----------
    folder
        Packed folder.
    """
    packed = Packed(folder)
    config, header = packed.config, packed.header
    active = gate = sparsity = None
    if header.profile:
        active = statistics.fmean(header.profile.per_layer(header.profile.active))
        gate = statistics.fmean(header.profile.per_layer(header.profile.gate_positive))
        sparsity = 1 - active
    parts = dict.fromkeys(("embedding and head", "attention", *_PARTS.values()), 0)
    for spec in packed.plan.values():
        parts[_PARTS.get(spec.role, "attention")] += spec.nbytes
    parameters = count_parameters(
        config,
        active=1.0 if active is None else active,
        gate_positive=1.0 if gate is None else gate,
    )
    return Inspection(
        folder=str(folder),
        architecture=config.model_type,
        quant=str(header.quant),
        activation=packed.activation,
        threshold=header.ffn.threshold,
        predictor=_describe(header.ffn.predictor),
        neuron_order=header.neuron_order,
        source=header.source,
        packed_by=header.packed_by,
        layers=config.num_hidden_layers,
        experts=families.experts(config),
        neurons=config.intermediate_size,
        hidden=config.hidden_size,
        context=config.max_position_embeddings,
        parameters=parameters.total,
        activated_parameters=None if active is None else parameters.activated,
        read_exact=None if active is None else parameters.read_exact,
        activation_sparsity=sparsity,
        bytes=sum(file.bytes for file in header.files.values()),
        parts=parts,
    )


def _describe(predictor: Predictor | None) -> str | None:
    if predictor is None:
        return None
    ranks = [rank for layer in predictor.ranks or [] for rank in layer]
    rank = f", rank {min(ranks)} to {max(ranks)}" if ranks else ""
    return f"{predictor}{rank}, reads {predictor.input}"


@dataclass(frozen=True)
class Validation:
    """What `validate` read."""

    folder: str
    files: int
    bytes: int

    def __rich__(self) -> str:
        return f"{self.folder}: whole ({self.files} files, {self.bytes:,} bytes)"


def validate(folder: AnyPath) -> Validation:
    """Check a packed folder to the last byte: structure, neuron orders, checksums, finite weights.

    Parameters
    ----------
    folder
        Packed folder.
    """
    packed = Packed(folder)
    packed.verify()
    files = packed.header.files.values()
    return Validation(str(folder), len(files), sum(file.bytes for file in files))
