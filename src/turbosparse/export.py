"""A sparse Hugging Face folder becomes files that other programs read.

turbosparse export mistral-sparse mistral.powerinfer.gguf --to powerinfer-gguf --quant q4_0
turbosparse export mistral-sparse TurboSparse-Mistral --to turbosparse
turbosparse export mistral-sparse predictor --to predictor-pt
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from turbosparse.base.errors import TurboSparseError
from turbosparse.base.folders import (
    AnyPath,
    check_free,
    copy_companions,
    local_path,
    named_disk_errors,
    new_file,
    new_folder,
    read_config,
    write_json,
)
from turbosparse.base.progress import track
from turbosparse.hf import families
from turbosparse.hf.checkpoint import INDEX, Checkpoint
from turbosparse.hf.config import ModelConfig, read_model_config
from turbosparse.hf.gguf import POWERINFER, gguf_table, pair_order
from turbosparse.hf.gguf_writer import add_tokenizer, write_gguf
from turbosparse.hf.hub import model_folder
from turbosparse.hf.load import activation_of, load_tokenizer, threshold_of
from turbosparse.hf.published import ABOVE_ZERO, PUBLISHED
from turbosparse.ops.predictor import Predictor
from turbosparse.packed.format import Packed, is_packed
from turbosparse.packed.stats import Stats
from turbosparse.predictors.mask import find_predictor

Kind = Literal["powerinfer-gguf", "turbosparse", "predictor-pt"]
_POWERINFER = {"drelu": "bamboo", "reglu": "llama"}  # the graph that computes an activation
# a family → model_type of the paper's models, and the prefix of their classes
_BAMBOO = ("bamboo", "Bamboo")
_LAYOUTS = {
    "mistral": _BAMBOO,
    "llama": _BAMBOO,
    "mixtral": ("turbosparsemixtral", "TurboSparseMixtral"),
}
# fields of config.json that those models do not have
_OWN = ("auto_map", "ffn_activation", "ffn_threshold", "predictor", "turbosparse")
_LATER = (
    "head_dim",
    "layer_types",
    "rope_parameters",
    "rope_scaling",
    "dtype",
    "transformers_version",
)


@dataclass(frozen=True)
class Exported:
    """What `export` wrote."""

    out: str
    to: str
    tensors: int
    bytes: int

    def __str__(self) -> str:
        return f"{self.out}: {self.to}, {self.tensors} tensors, {self.bytes / 1e6:.1f} MB"


class _Model(NamedTuple):
    folder: Path
    config: ModelConfig
    checkpoint: Checkpoint
    predictor: Predictor | None

    def refuse(self, program: str, what: str) -> NoReturn:
        raise TurboSparseError(f"{self.folder} cannot be exported: {program} {what}")


def export(
    model: str, out: AnyPath, *, to: Kind, quant: Literal["f16", "q4_0"] = "f16"
) -> Exported:
    """Write a sparse model in the form of another program.

    Parameters
    ----------
    model
        Model folder, GGUF file or hub id; not a packed folder, which has lost bits.
    out
        New file for powerinfer-gguf, new folder for the others.
    to
        powerinfer-gguf: one file that PowerInfer runs, predictor included. turbosparse: the layout
        of the paper's models, whose own code applies the predictor always. predictor-pt: the
        predictor alone, one model_LAYER.pt each, as PowerInfer's converter takes it; with the
        counts of `analyse`, if there are any, from which PowerInfer splits a model between
        processor and GPU.
    quant
        Of the matrices in powerinfer-gguf. PowerInfer computes wrong numbers in any other.
    """
    out = local_path(out)
    check_free(out)
    source = _open(model_folder(model))
    write = {"powerinfer-gguf": _gguf, "turbosparse": _published, "predictor-pt": _predictor}[to]
    with named_disk_errors(out):
        tensors = write(source, out, quant)
    files = [out] if out.is_file() else [path for path in out.rglob("*") if path.is_file()]
    return Exported(str(out), to, tensors, sum(path.stat().st_size for path in files))


def _open(folder: Path) -> _Model:
    if is_packed(folder):
        raise TurboSparseError(
            f"{folder} is a packed folder; export the model that it was packed from, "
            f"{Packed(folder).header.source}"
        )
    config, checkpoint = read_model_config(folder), Checkpoint(folder)
    checkpoint.check(config)
    return _Model(folder, config, checkpoint, find_predictor(config, checkpoint))


# --- PowerInfer -----------------------------------------------------------------------------------


def _check_powerinfer(model: _Model) -> Predictor:
    """The predictor of a model that PowerInfer runs as we do."""
    if model.predictor is None:
        model.refuse("PowerInfer", "needs a predictor, and the model holds none")
    if model.predictor.kind == "sign":
        model.refuse("PowerInfer", "has no predictor of signs")
    if families.experts(model.config):
        model.refuse("PowerInfer", "runs no mixture of experts")
    if model.predictor.input != "pre_norm":
        model.refuse(
            "PowerInfer", "gives a predictor the residual before the norm, this one reads post_norm"
        )
    return model.predictor


def _gguf(model: _Model, out: Path, quant: str) -> int:
    predictor, config = _check_powerinfer(model), model.config
    activation = activation_of(config)
    if activation not in _POWERINFER:
        model.refuse("PowerInfer", f"computes {' and '.join(_POWERINFER)}, not {activation}")
    _check_plain(model, "PowerInfer")
    tokenizer, kind = load_tokenizer(model.folder), quant.upper()

    threshold, sizes = _one_threshold(model, predictor)

    def describe(writer: Any) -> None:
        writer.add_float32("powerinfer.sparse_threshold", threshold)
        add_tokenizer(writer, tokenizer, config.vocab_size)

    tensors = _powerinfer_tensors(model)
    data = _stored(model, track(tensors, "exporting"), kind, sizes)
    with new_file(out) as work:
        write_gguf(work, _POWERINFER[activation], config, kind, tensors, data, describe)
        with work.open("r+b") as file:
            file.write(POWERINFER)
    return len(tensors)


def _check_plain(model: _Model, program: str) -> None:
    """Raise unless all but the activation is as in the first Llama and Mistral models."""
    config = model.config
    if threshold := threshold_of(config):
        model.refuse(program, f"has no threshold for gates, this model has {threshold:g}")
    if any(tensor.role.endswith(".bias") for tensor in families.tensors(config)):
        model.refuse(program, "has no biases in attention, this model has")
    head = config.hidden_size // config.num_attention_heads
    if config.head_dim != head:
        model.refuse(program, f"computes a head size of {head}, this model has {config.head_dim}")
    if (rope := config.rope_parameters["rope_type"]) != "default":
        model.refuse(program, f"does not scale RoPE as this model does ({rope})")


def _powerinfer_tensors(model: _Model) -> list[families.Tensor]:
    """Of a file in PowerInfer's names; a tied head is written out."""
    own = families.table(model.config)
    table = gguf_table(model.config, biases=False, sparse=True)
    untied = model.config.model_copy(update={"tie_word_embeddings": False})
    tensors = [
        tensor._replace(shape=tensor.shape[::-1]) if tensor.role == "down" else tensor
        for tensor in table.tensors(untied)
    ]
    for layer in range(model.config.num_hidden_layers):
        for role in ("fc1", "fc2"):
            row, shape = table.row(role), model.checkpoint.shape(own.name(role, layer))
            assert row is not None
            tensors.append(families.Tensor(table.name(role, layer), row, layer, None, shape))
    return tensors


def _one_threshold(model: _Model, predictor: Predictor) -> tuple[float, list[float]]:
    """The threshold of all layers, and by what each layer's fc2 is divided to have it."""
    own = predictor.threshold
    if not isinstance(own, list):
        return own, [1.0] * model.config.num_hidden_layers
    each = [layer[0] for layer in own]
    if max(each) >= 0:
        model.refuse(
            "PowerInfer",
            f"has one threshold for all layers, this model has {min(each):g} to "
            f"{max(each):g}, and only negative ones can be made one",
        )
    return -1.0, [-threshold for threshold in each]


def _stored(
    model: _Model, tensors: Iterator[families.Tensor], kind: str, sizes: list[float]
) -> Iterator[NDArray[Any]]:
    import gguf

    config, own = model.config, families.table(model.config)
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    for tensor in tensors:
        tied = tensor.role == "head" and config.tie_word_embeddings
        name = own.name("embedding" if tied else tensor.role, tensor.layer)
        weight = model.checkpoint[name].float().numpy()
        if not np.abs(weight).max() < np.finfo(np.float16).max:
            raise TurboSparseError(f"{name} holds NaN, or a number beyond half precision")
        if tensor.role in heads:
            weight = pair_order(weight, heads[tensor.role])
        elif tensor.role == "down":
            weight = np.ascontiguousarray(weight.T)
        elif tensor.role == "fc2":
            weight = weight / np.float32(sizes[tensor.layer or 0])
        own_kind = gguf.GGMLQuantizationType["F32" if tensor.row.packed == "float" else kind]
        yield gguf.quantize(weight, own_kind)


def _predictor(model: _Model, out: Path, _: str) -> int:
    predictor, name = _check_powerinfer(model), families.table(model.config).name
    stats = Stats.find(model.folder)
    threshold, sizes = _one_threshold(model, predictor)
    with new_folder(out) as work:
        for layer in track(range(model.config.num_hidden_layers), "exporting"):
            fc1, fc2 = (model.checkpoint[name(role, layer)] for role in ("fc1", "fc2"))
            matrices = {"fc1.weight": fc1, "fc2.weight": fc2 / sizes[layer]}
            torch.save(matrices, work / f"model_{layer}.pt")
            if stats:
                (work / "activation").mkdir(exist_ok=True)
                torch.save(stats.active[layer, 0], work / f"activation/activation_{layer}.pt")
        write_json(work / "config.json", {"sparse_threshold": threshold})
    return 2 * model.config.num_hidden_layers


# --- the paper's models ---------------------------------------------------------------------------


def _published(model: _Model, out: Path, _: str) -> int:
    config, program = model.config, "the published layout"
    base = str(families.family(config.model_type))
    activation = activation_of(config)
    if base not in _LAYOUTS or activation != "drelu":
        model.refuse(program, f"holds dReLU Mistral and Mixtral models, not {activation} {base}")
    kind, classes = _LAYOUTS[base]
    reads, known = PUBLISHED[kind].predictor_input, model.predictor
    if known and not (known.input == reads and known.threshold in (0, ABOVE_ZERO)):
        model.refuse(
            program,
            f"has a predictor that reads {reads} with threshold 0, this one "
            f"reads {known.input} with threshold {known.least}",
        )
    if known is None and families.experts(config):
        model.refuse(program, "of a mixture of experts needs a predictor, and the model holds none")
    _check_plain(model, program)
    raw = {k: v for k, v in read_config(model.folder).items() if k not in (*_OWN, *_LATER)}
    raw |= config.model_dump(exclude={*_OWN, *_LATER}, exclude_none=True)
    raw |= {
        "sliding_window": config.sliding_window,
        "model_type": kind,
        "architectures": [f"{classes}ForCausalLM"],
        "hidden_act": "relu",
        "rope_theta": config.rope_parameters["rope_theta"],
        "torch_dtype": str(next(iter(model.checkpoint.values())).dtype).removeprefix("torch."),
    }
    with new_folder(out) as work:
        for shard in track(model.checkpoint.shards, "exporting"):
            shutil.copyfile(shard, work / shard.name)
        if (model.folder / INDEX).is_file():
            shutil.copyfile(model.folder / INDEX, work / INDEX)
        copy_companions(model.folder, work)
        write_json(work / "config.json", raw)
    return len(model.checkpoint)
