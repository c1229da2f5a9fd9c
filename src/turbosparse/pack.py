"""Stage 5: a sparse Hugging Face folder becomes a packed folder that the engine reads.

Streams tensor by tensor: a model of any size packs in the memory of its largest matrix or of one
feed-forward, as on disk and packed.
With the statistics of `analyse` the neurons of each FFN are laid hot first, which does not change
the function computed, and q4 keeps those columns best that matter most. With text q4 loses least:
its rounding errors make up for one another.

    turbosparse pack mistral-sparse mistral-q4 --quant q4
    turbosparse pack mistral-sparse mistral-q4 --data web.jsonl --data books
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from turbosparse import __version__
from turbosparse.base.errors import TurboSparseError
from turbosparse.base.folders import (
    AnyPath,
    check_free,
    copy_companions,
    local_path,
    new_folder,
    write_json,
)
from turbosparse.base.machine import Device
from turbosparse.base.progress import track
from turbosparse.hf import families
from turbosparse.hf.activations import ACTIVATIONS, Activation
from turbosparse.hf.checkpoint import Checkpoint
from turbosparse.hf.hub import model_folder
from turbosparse.hf.layerwise import Layerwise
from turbosparse.hf.load import (
    activation_keys,
    activation_of,
    load_config,
    load_tokenizer,
    threshold_of,
)
from turbosparse.hf.powerinfer import read_predictor
from turbosparse.hf.published import own_fields
from turbosparse.ops.feedback import Feedback
from turbosparse.ops.predictor import Predictor
from turbosparse.ops.quant import quantise, signs
from turbosparse.ops.rows import FFNRows, Quant, bundle_bytes, row_bytes
from turbosparse.packed.files import Spec, write_weights
from turbosparse.packed.format import (
    cluster_neurons,
    ffn_prefix,
    layout,
    pair_bytes,
    same_matrices,
)
from turbosparse.packed.header import FFN, VERSION, Header, QuantMap
from turbosparse.packed.moments import Moments
from turbosparse.packed.stats import Stats
from turbosparse.predictors.mask import find_predictor
from turbosparse.predictors.score import run_layers
from turbosparse.training.sample import sequences

CHUNK = 1 << 20  # weights that are quantised at once
CHECK_TOKENS = 4096


@dataclass(frozen=True)
class PackedModel:
    """What `pack` wrote."""

    out: str
    quant: str
    activation: str
    predictor: str | None
    neuron_order: str
    bytes: int
    source_bytes: int

    def __str__(self) -> str:
        predictor = f"{self.predictor}, " if self.predictor else ""
        return (
            f"{self.out}: {self.activation}, {self.quant}, {predictor}"
            f"neurons in {self.neuron_order} order, "
            f"{self.bytes / 1e6:.1f} MB (from {self.source_bytes / 1e6:.1f} MB)"
        )


def pack(
    model: str,
    out: AnyPath,
    *,
    quant: Quant = "q4",
    quant_map: str = "",
    stats: AnyPath | None = None,
    predictor: Literal["auto", "none", "sign"] | str = "auto",
    predictor_quant: Quant = "q8",
    predictor_input: Literal["pre_norm", "post_norm"] | None = None,
    activation: Activation | None = None,
    data: Sequence[AnyPath] | None = None,
    template: str = "{text}",
    separator: str | None = None,
    tokens: int = 65_536,
    device: Device = "auto",
    bundle: bool = False,
) -> PackedModel:
    """Quantise a model and lay it out for sparse reading.

    Parameters
    ----------
    model
        Model folder or hub id: a dense model, a sparse one of ours, or one that others published.
    out
        New packed folder.
    quant
        q4, q4_0 and q8 have the numbers of GGUF IQ4_NL, Q4_0 and Q8_0: a file in one of these comes
        through unchanged. f16 is exact for bf16 weights in its range. With q4 and q4_0 the
        embedding and the head are q8.
    quant_map
        Another quant for some matrices, such as head=q4,down=q8: of embedding, q, k, v, o, head,
        gate, up, down, or of attention and ffn as a whole.
    stats
        stats.turbosparse of `analyse`; by default the one in the model folder, if any.
    predictor
        auto packs the predictor that is merged in the model, if any; a folder or hub id that holds
        model_0.pt, model_1.pt, … packs that one, made for PowerInfer; sign needs none: it compares
        the signs of weights and inputs.
    predictor_quant
        Of the matrices of a merged predictor.
    predictor_input
        What a merged predictor reads, where config.json does not say it: the residual before the
        norm, or what the feed-forward reads after it.
    activation
        Run the weights with this feed-forward, where neither config.json nor the name of the model
        tells which they were trained with.
    data
        Text, JSON-lines or .gz file, or a folder of them, that the model is put through layer by
        layer: what rounding a weight to q4 loses there, the weights after it make up for. Repeat it
        for more; each gets an equal share, and so do the files of a folder. A predictor is checked
        on it too: one of another model or with another input is refused, and what it was found to
        do there is recorded.
    template
        How a JSON row becomes text, such as "{question} {answer}".
    separator
        Text between the documents of a text file; without it a file is one document.
    tokens
        Of this text, about so many.
    device
        Where the layers run that the text is put through: auto takes a GPU if there is one.
    bundle
        Put gate, up and down of a neuron side by side, so that one read fetches all three: for
        predicted mode from disk (--memory of generate and serve). From memory exact mode then is
        slower.
    """
    out = local_path(out)
    check_free(out)
    folder = model_folder(model)
    config = load_config(folder, activation)
    tokenizer = load_tokenizer(folder)
    raw = own_fields(folder, tokenizer)
    checkpoint = Checkpoint(folder)
    checkpoint.check(config)
    if predictor not in ("auto", "none", "sign"):
        apart, raw["predictor"] = read_predictor(predictor, config)
        checkpoint.merge(predictor, apart)
    found = find_predictor(
        config, checkpoint, predictor, predictor_quant, predictor_input, raw.get("predictor")
    )
    quants = QuantMap.default(quant, _pairs(quant_map), same=same_matrices(config))
    q4 = "q4" in quants.model_dump().values()
    if data and not (found or q4):
        raise TurboSparseError("--data is for q4 and for a predictor, and neither is packed")
    texts = [local_path(path) for path in data or ()]
    how: dict[str, Any] = {"template": template, "separator": separator}
    if texts and found:
        found = _checked(
            checkpoint,
            config,
            found,
            sequences(folder, config, texts, CHECK_TOKENS, **how),
            device,
        )
    ffn = FFN(
        activation=activation_of(config),  # type: ignore[arg-type]
        threshold=threshold_of(config),
        predictor=found,
    )
    profile = Stats.find(folder, local_path(stats) if stats else None)
    if profile:
        profile.check(config)
    plan = layout(config, quants, ffn.predictor, bundled=bundle)
    moments = None
    if texts and q4:
        ids = sequences(folder, config, texts, tokens, **how)
        moments = Moments(Layerwise(folder, activation=activation, device=device), ids)
    choices = _Choices(quants, profile, ffn, moments, bundle)

    with new_folder(out) as work:
        copy_companions(folder, work)
        if not (work / "tokenizer.json").is_file():  # the form that the engine reads
            tokenizer.backend_tokenizer.save(str(work / "tokenizer.json"))
        tensors = _tensors(config, checkpoint, plan, choices)
        tensors = track(tensors, "packing", total=len(plan))
        files = write_weights(work, plan, tensors)
        header = Header(
            format_version=VERSION,
            quant=quants,
            cluster_neurons=cluster_neurons(config.hidden_size, choices.kinds),
            ffn=ffn,
            neuron_order="hot_first" if profile else "model",
            bundled=bundle,
            source=str(model),
            packed_by=f"turbosparse {__version__}",
            profile=profile.profile() if profile else None,
            files=files,
        )
        raw |= activation_keys(config.model_type, ffn.activation, ffn.threshold)
        raw = {key: raw[key] for key in raw if key not in ("auto_map", "predictor")}
        raw["turbosparse"] = header.model_dump(mode="json")
        write_json(work / "config.json", raw)
    return PackedModel(
        out=str(out),
        quant=str(quants),
        activation=header.ffn.activation,
        predictor=str(ffn.predictor) if ffn.predictor else None,
        neuron_order=header.neuron_order,
        bytes=sum(file.bytes for file in files.values()),
        source_bytes=sum(path.stat().st_size for path in checkpoint.shards),
    )


def _checked(
    checkpoint: Checkpoint, config: Any, predictor: Predictor, ids: Tensor, device: Device
) -> Predictor:
    """The record with what the predictor does on text; raises if that is little."""
    layers = Layerwise(checkpoint.folder, activation=activation_of(config), device=device)
    layers.checkpoint = checkpoint  # with a predictor that is published apart
    _, _, (run,) = run_layers(layers, predictor, ids, [])
    run.check(checkpoint.folder, predictor, config.intermediate_size)
    return predictor.model_copy(update=run.total().shares(config.intermediate_size))


class _Choices(NamedTuple):
    quants: QuantMap
    stats: Stats | None
    ffn: FFN
    moments: Moments | None
    bundle: bool

    @property
    def parts(self) -> tuple[str, ...]:
        """Of a feed-forward, those that are packed."""
        return ACTIVATIONS[self.ffn.activation].parts

    @property
    def kinds(self) -> tuple[str, ...]:
        """Their quantisation."""
        return self.quants.of(self.parts)

    def importance(self, role: str, layer: int | None) -> Tensor | None:
        return self.stats.importance(role, layer) if self.stats else None

    def feedback(self, role: str, quant: str, layer: int | None, expert: int | None) -> Any:
        if not self.moments or quant != "q4" or layer is None:
            return None
        return self.moments.feedback(role, layer, expert)


def _pairs(text: str) -> dict[str, str]:
    """``a=b,c=d`` as a table."""
    pairs = [item.split("=") for item in text.replace(" ", "").split(",") if item]
    if any(len(pair) != 2 for pair in pairs):
        raise TurboSparseError(f"quant map {text!r} is not valid; write it like head=q8,down=q8")
    return dict(pairs)


def _tensors(
    config: Any, checkpoint: Checkpoint, plan: dict[str, Spec], choices: _Choices
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Every tensor of `plan`, in its order."""
    ffns = {ffn_prefix(*slot): slot for slot in families.ffns(config)}
    for name, spec in plan.items():
        if spec.role in ("gate", "bundles"):
            yield from _ffn(config, checkpoint, choices, ffns[name.removesuffix(spec.role)])
        elif spec.role in ("pairs", "neuron_order", "predictor"):
            continue  # came with the gates
        elif spec.quant:
            tied = spec.role == "embedding" and config.tie_word_embeddings
            _, layer, _ = families.table(config).find(name) or (None, None, None)
            importance = choices.importance("head" if tied else spec.role, layer)
            feedback = choices.feedback(spec.role, spec.quant, layer, None)
            how: dict[str, Any] = {"importance": importance, "feedback": feedback}
            yield name, _quantised(checkpoint, name, spec.quant, **how)
        else:
            yield name, _finite(name, checkpoint[name].float().numpy())


def _ffn(
    config: Any, checkpoint: Checkpoint, choices: _Choices, slot: tuple[int, int | None]
) -> Iterator[tuple[str, NDArray[Any]]]:
    """The tensors of one feed-forward, in the order of the plan."""
    prefix, name = ffn_prefix(*slot), families.table(config).name
    hidden, quants, predictor = config.hidden_size, choices.kinds, choices.ffn.predictor
    order = _order(choices.stats, *slot, config.intermediate_size)
    if choices.bundle:
        bundles = np.zeros((len(order), bundle_bytes(hidden, quants)), np.uint8)
        rows = FFNRows.of_bundles(bundles, hidden, quants)
    else:
        gates = np.empty((len(order), row_bytes(quants[0], hidden)), np.uint8)
        pairs = np.empty((len(order), pair_bytes(hidden, quants)), np.uint8)
        rows = FFNRows(gates, pairs, hidden, quants)
    for part, quant, out in zip(choices.parts, quants, rows.split(), strict=True):
        _quantised(
            checkpoint,
            name(part, *slot),
            quant,
            order,
            importance=choices.importance(part, slot[0]),
            feedback=choices.feedback(part, quant, *slot),
            out=out,
            transpose=part == "down",
        )
    if rows.bundles is not None:
        yield f"{prefix}bundles", rows.bundles
    else:
        yield f"{prefix}gate", rows.gates
        yield f"{prefix}pairs", rows.pairs
    yield f"{prefix}neuron_order", order.int().numpy()
    if predictor and predictor.kind == "sign":
        yield (
            f"{prefix}predictor.signs",
            signs(rows, len(ACTIVATIONS[choices.ffn.activation].zero_by)),
        )
    elif predictor:
        own, fc1, fc2 = str(predictor.quant), *(name(role, *slot) for role in ("fc1", "fc2"))
        yield f"{prefix}predictor.fc1", _quantised(checkpoint, fc1, own)
        yield f"{prefix}predictor.fc2", _quantised(checkpoint, fc2, own, order)


def _order(stats: Stats | None, layer: int, expert: int | None, neurons: int) -> Tensor:
    """Neuron indices, the most often active first."""
    if stats is None:
        return torch.arange(neurons)
    return stats.active[layer, expert or 0].argsort(descending=True, stable=True)


def _quantised(
    checkpoint: Checkpoint,
    name: str,
    quant: str,
    order: Tensor | None = None,
    *,
    importance: Tensor | None = None,
    feedback: Feedback | None = None,
    out: NDArray[np.uint8] | None = None,
    transpose: bool = False,
) -> NDArray[np.uint8]:
    """Packed rows, some at a time: beside them only the weights as they are on disk take memory.

    With `feedback` all rows at once. Those of a transposed matrix are its inputs.
    """
    weights = checkpoint[name].T if transpose else checkpoint[name]
    rows, cols = weights.shape
    if out is None:
        out = np.empty((rows, row_bytes(quant, cols)), np.uint8)
    places = torch.arange(rows) if order is None else order
    try:
        if feedback:
            made = feedback.rows(weights) if transpose else feedback.columns(weights)
            out[:] = made[places].numpy()
            return out
        for part in torch.arange(rows).split(max(1, CHUNK // cols)):
            out[part] = quantise(weights[places[part]], quant, importance).numpy()
    except TurboSparseError as error:
        raise TurboSparseError(f"{name}: {error}") from error
    return out


def _finite(name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
    if not np.isfinite(values).all():
        raise TurboSparseError(
            f"{name} holds NaN or infinity; export the model again from a sound checkpoint"
        )
    return values
