"""A GGUF file becomes a Hugging Face folder: config, tokenizer and weights.

Quantised tensors become float32, which holds each of their numbers exactly, so packing them in the
same block format gives back the same bits. What this reader does not know, it refuses by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turbosparse.base.errors import TurboSparseError
from turbosparse.base.folders import new_folder, write_json
from turbosparse.hf import families
from turbosparse.hf.config import ModelConfig, parse

POWERINFER = b"PWRI"  # instead of GGUF: what makes PowerInfer run a file sparsely
SHARD_BYTES = 2 << 30
ARCHITECTURES = ("llama", "qwen2", "arcee", "nemotron")
_PERMUTED = ("llama", "arcee")  # q and k have the two of a rotation side by side
# metadata of an architecture → config.json
CONFIG = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
}
_REQUIRED = ("block_count", "context_length", "embedding_length", "feed_forward_length")
# they repeat what the fields above say, which `_config` checks, or tell nothing about the function
_REPEATED = ("attention.value_length", "rope.dimension_count", "rope.scaling.finetuned")
_ROPE = ("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length")
SPECIAL = {
    "bos_token_id": "bos_token",
    "eos_token_id": "eos_token",
    "unknown_token_id": "unk_token",
    "padding_token_id": "pad_token",
}
# how text is split before the merges of a byte-level BPE, by the file's name for it
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {"qwen2": _QWEN2, "llama-bpe": _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")}
PRE_TOKENIZERS = ("gpt-2", "smollm", *_SPLITS)


def import_gguf(source: Path, out: Path) -> None:
    """Write the model of a GGUF file as a Hugging Face folder.

    Raises:
        TurboSparseError: not a GGUF file, or one with an architecture, a setting, a tokenizer or a
            tensor that this reader does not know; `out` is not left behind then.
    """
    reader = _open(source)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    config, permuted = _config(source, fields, {tensor.name for tensor in reader.tensors})
    model = parse(config, source)
    with new_folder(out) as work:
        _write_tokenizer(source, fields, work)
        write_json(work / "config.json", config)
        _write_weights(work, _tensors(source, reader, model, permuted=permuted))


def _open(source: Path) -> Any:
    from gguf import GGUFReader

    try:
        _refuse_powerinfer(source)
        return GGUFReader(source)
    except FileNotFoundError:
        raise TurboSparseError(f"no such file: {source}") from None
    except TurboSparseError:
        raise
    except Exception as error:  # the reader indexes and decodes whatever the bytes say
        raise TurboSparseError(
            f"{source} cannot be read as GGUF ({error}); download it again"
        ) from error


def _refuse_powerinfer(source: Path) -> None:
    with source.open("rb") as file:
        if file.read(len(POWERINFER)) == POWERINFER:
            raise TurboSparseError(
                f"{source} is a file for PowerInfer; such files are written, but not read: give "
                "the model that it was made of"
            )


def _config(source: Path, fields: dict[str, Any], tensors: set[str]) -> tuple[dict[str, Any], bool]:
    """The ``config.json``, and whether the rows of q and k are permuted."""
    kind = str(fields.get("general.architecture"))
    if kind not in ARCHITECTURES:
        raise TurboSparseError(
            f"{source}: architecture {kind!r} is not supported; supported are "
            f"{', '.join(ARCHITECTURES)}"
        )
    own = {
        key.removeprefix(f"{kind}."): value
        for key, value in fields.items()
        if key.startswith(f"{kind}.")
    }
    known = {*CONFIG, *_REPEATED, *_ROPE}
    if unknown := sorted(own.keys() - known):
        raise TurboSparseError(f"{source}: {kind}.{unknown[0]} is a setting that is not supported")
    if missing := [key for key in _REQUIRED if key not in own]:
        raise TurboSparseError(f"{source}: {kind}.{missing[0]} is missing; download the file again")
    base = "mixtral" if own.get("expert_count") else kind
    config = {CONFIG[key]: value for key, value in own.items() if key in CONFIG}
    config |= {
        "model_type": base,
        "architectures": [f"{base.title()}ForCausalLM"],
        "hidden_act": "silu" if base in families.GATED else "relu2",
        "tie_word_embeddings": "output.weight" not in tensors,
        "torch_dtype": "float32",
    }
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config.setdefault("vocab_size", len(fields["tokenizer.ggml.tokens"]))
    head = config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    if kind == "nemotron":
        config["partial_rotary_factor"] = own.pop("rope.dimension_count", head) / head
    for key in ("attention.value_length", "rope.dimension_count"):
        if own.get(key, head) != head:
            raise TurboSparseError(
                f"{source}: {kind}.{key} is {own[key]}, not the head size {head}: not supported"
            )
    bias = families.TABLES[base].row("q.bias")
    if bias and bias.when == "biased":
        config["attention_bias"] = any(name.endswith("attn_q.bias") for name in tensors)
    _set_rope(source, config, own)
    for token in ("bos", "eos"):
        if (number := fields.get(f"tokenizer.ggml.{token}_token_id")) is not None:
            config[f"{token}_token_id"] = number
    return config, kind in _PERMUTED


def _set_rope(source: Path, config: dict[str, Any], own: dict[str, Any]) -> None:
    rope: dict[str, Any] = {"rope_theta": config.pop("rope_theta", 10000.0), "rope_type": "default"}
    scaling = own.get("rope.scaling.type", "none")
    if scaling in ("linear", "yarn"):
        rope |= {"rope_type": scaling, "factor": own["rope.scaling.factor"]}
        if original := own.get("rope.scaling.original_context_length"):
            rope["original_max_position_embeddings"] = original
    elif scaling != "none":
        raise TurboSparseError(f"{source}: rope.scaling.type {scaling!r} is not supported")
    config["rope_parameters"] = rope


def _write_tokenizer(source: Path, fields: dict[str, Any], work: Path) -> None:
    ggml = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in fields.items()
        if key.startswith("tokenizer.ggml.")
    }
    kind = ggml.get("model")
    if kind == "gpt2":
        fast = _byte_level(source, ggml)
    elif kind == "llama":
        from transformers import AutoTokenizer

        loaded = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        fast = loaded.backend_tokenizer
    else:
        raise TurboSparseError(
            f"{source}: a tokenizer of the kind {kind!r} is not supported; gpt2 and llama are"
        )
    fast.save(str(work / "tokenizer.json"))
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings |= {"clean_up_tokenization_spaces": False}
    for key, name in SPECIAL.items():
        if (number := ggml.get(key)) is not None:
            settings[name] = ggml["tokens"][number]
    if template := fields.get("tokenizer.chat_template"):
        settings["chat_template"] = template
    write_json(work / "tokenizer_config.json", settings)


def _byte_level(source: Path, ggml: dict[str, Any]) -> Any:
    """The byte-level BPE of a file, as a `tokenizers.Tokenizer`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing

    pre, tokens = ggml.get("pre", "gpt-2"), ggml["tokens"]
    if pre not in PRE_TOKENIZERS:
        raise TurboSparseError(
            f"{source}: tokenizer.ggml.pre is {pre!r}, a way to split text that is not supported; "
            f"supported are {', '.join(PRE_TOKENIZERS)}"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in ggml["merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    fast = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
    space = bool(ggml.get("add_space_prefix", False))
    if pre in _SPLITS:
        split = pre_tokenizers.Split(Regex(_SPLITS[pre]), "isolated")
        steps = [split, pre_tokenizers.ByteLevel(space, use_regex=False)]
    else:
        digits = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
        steps = [*digits, pre_tokenizers.ByteLevel(space)]
    fast.pre_tokenizer = pre_tokenizers.Sequence(steps)
    fast.decoder = decoders.ByteLevel()
    kinds = ggml.get("token_type", [1] * len(tokens))
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (3, 4):  # control, user-defined
            fast.add_special_tokens([AddedToken(token, special=True, normalized=False)])
    if ggml.get("add_bos_token"):
        bos = tokens[ggml["bos_token_id"]]
        fast.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, ggml["bos_token_id"])]
        )
    return fast


_NORMS = {
    "attention_norm": "blk.{layer}.attn_norm",
    "ffn_norm": "blk.{layer}.ffn_norm",
    "norm": "output_norm",
}


def gguf_table(config: Any, *, biases: bool = True, sparse: bool = False) -> families.Table:
    """The weights by their names in a GGUF file, where the experts of a layer are one tensor.

    Args:
        biases: whether q, k, v and o may have one.
        sparse: as PowerInfer names them: with a predictor, and the down projection transposed.
    """
    stacked = "_exps" if families.experts(config) else ""
    patterns = {
        "embedding": "token_embd.weight",
        "router": "blk.{layer}.ffn_gate_inp.weight",
        "head": "output.weight",
    }
    for role, part in _NORMS.items():
        patterns |= {role: f"{part}.weight", f"{role}.bias": f"{part}.bias"}
    for role, part in {"q": "q", "k": "k", "v": "v", "o": "output"}.items():
        patterns[role] = f"blk.{{layer}}.attn_{part}.weight"
        if biases:
            patterns[f"{role}.bias"] = f"blk.{{layer}}.attn_{part}.bias"
    patterns |= {role: f"blk.{{layer}}.ffn_{role}{stacked}.weight" for role in families.FFN_ROLES}
    if sparse:
        patterns |= {role: f"blk.{{layer}}.{role}.weight" for role in ("fc1", "fc2")}
        patterns["down"] = "blk.{layer}.ffn_down_t.weight"
    return families.table(config).renamed(patterns)


def _tensors(
    source: Path, reader: Any, config: ModelConfig, *, permuted: bool
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Every weight by its Hugging Face name; experts one by one."""
    name, whole = families.table(config).name, families.table(config).row("norm.bias")
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    waiting = {tensor.name: tensor for tensor in reader.tensors}
    for wanted in gguf_table(config).tensors(config):
        found = waiting.pop(wanted.name, None)
        if found is None:
            raise TurboSparseError(f"{source}: {wanted.name} is missing; download the file again")
        shape = tuple(int(size) for size in reversed(found.shape))
        if shape != wanted.shape:
            raise TurboSparseError(
                f"{source}: {wanted.name} is {list(shape)}, its settings ask for "
                f"{list(wanted.shape)}; download the file again"
            )
        weight = _numbers(source, found).reshape(shape)
        if permuted and wanted.role.removesuffix(".bias") in heads:
            weight = _rotary_order(weight, heads[wanted.role[0]])
        if whole and wanted.role in _NORMS:  # LayerNorm1P: a file holds the sum of weight and one
            weight = weight - 1
        if wanted.row.packed == "ffn" and families.experts(config):
            for expert, part in enumerate(weight):
                yield name(wanted.role, wanted.layer, expert), np.ascontiguousarray(part)
        else:
            yield name(wanted.role, wanted.layer), weight
    if waiting:
        raise TurboSparseError(f"{source} holds a tensor that is not supported: {min(waiting)}")


def _numbers(source: Path, tensor: Any) -> NDArray[Any]:
    """Half precision as it is; everything else as float32."""
    from gguf import GGMLQuantizationType, dequantize

    if tensor.tensor_type == GGMLQuantizationType.F16:
        return np.array(tensor.data)
    try:
        return np.array(dequantize(tensor.data, tensor.tensor_type), np.float32)
    except NotImplementedError as error:
        raise TurboSparseError(
            f"{source}: {tensor.name} is {tensor.tensor_type.name}, which cannot be read"
        ) from error


def _rotary_order(weight: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows of q or k from pairs of neighbours to pairs half a head apart."""
    pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)


def pair_order(weight: NDArray[Any], heads: int) -> NDArray[Any]:
    """The way back: rows of q or k to pairs of neighbours."""
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def _write_weights(work: Path, tensors: Iterator[tuple[str, NDArray[Any]]]) -> None:
    """Shards of about `SHARD_BYTES` and their index; one shard is in memory at a time."""
    from safetensors.numpy import save_file

    shards: list[dict[str, NDArray[Any]]] = []
    home: dict[str, int] = {}
    held: dict[str, NDArray[Any]] = {}
    size = total = 0

    def flush() -> None:
        save_file(held, work / f"part-{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append({})
        held.clear()

    for name, array in tensors:
        if held and size + array.nbytes > SHARD_BYTES:
            flush()
            size = 0
        held[name], home[name] = array, len(shards)
        size, total = size + array.nbytes, total + array.nbytes
    flush()
    if len(shards) == 1:
        (work / "part-0.safetensors").rename(work / "model.safetensors")
        return
    names = [f"model-{n + 1:05}-of-{len(shards):05}.safetensors" for n in range(len(shards))]
    for number, name in enumerate(names):
        (work / f"part-{number}.safetensors").rename(work / name)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {k: names[n] for k, n in home.items()},
    }
    write_json(work / "model.safetensors.index.json", index)
