"""A GGUF file is written: settings, tokenizer, and one tensor after the other."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import closing
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turbosparse.base.errors import TurboSparseError
from turbosparse.hf import families
from turbosparse.hf.config import ModelConfig
from turbosparse.hf.gguf import CONFIG, SPECIAL

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)  # the types of a token
_GPT2 = {"add_prefix_space": False, "type": "ByteLevel", "use_regex": True}  # how it splits text


def write_gguf(
    path: Path,
    arch: str,
    config: ModelConfig,
    kind: str,
    tensors: Iterable[families.Tensor],
    data: Iterable[NDArray[Any]],
    describe: Callable[[Any], None],
) -> None:
    """Write a file that holds one tensor in memory at a time.

    Args:
        arch: name of the architecture.
        kind: of the matrices, as `gguf` names it; vectors are float32.
        tensors: by their names in the file.
        data: what is stored of them, in the same order.
        describe: adds the tokenizer, and what else is to be said, to the `gguf.GGUFWriter`.
    """
    import gguf

    with closing(gguf.GGUFWriter(path, arch)) as writer:
        _add_settings(writer, arch, config)
        describe(writer)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
        for tensor in tensors:
            own = gguf.GGMLQuantizationType["F32" if tensor.row.packed == "float" else kind]
            stored = gguf.quant_shape_to_byte_shape(tensor.shape, own)
            writer.add_tensor_info(tensor.name, stored, np.dtype("u1"), prod(stored), raw_dtype=own)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for array in data:
            writer.write_tensor_data(array)


def _add_settings(writer: Any, arch: str, config: ModelConfig) -> None:
    """The graphs that read these files slide no window, so the context ends with it."""
    head, context = families.config_head_dim(config), config.max_position_embeddings
    part = config.rope_parameters.get("partial_rotary_factor", 1)
    fields = config.model_dump() | {
        "rope_theta": config.rope_parameters["rope_theta"],
        "max_position_embeddings": min(context, config.sliding_window or context),
        "sliding_window": None,
    }
    for key, field in CONFIG.items():
        if (value := fields[field]) is not None:
            add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add(f"{arch}.{key}", value)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(int(part * head))


def add_tokenizer(writer: Any, tokenizer: Any, size: int) -> None:
    """Describe a tokenizer as llama.cpp of 2023 reads it, filled up to `size` tokens.

    Raises:
        TurboSparseError: that program would split text in another way.
    """
    fast = json.loads(tokenizer.backend_tokenizer.to_str())
    model = fast["model"]
    if model["type"] != "BPE":
        raise TurboSparseError(f"a tokenizer of the kind {model['type']} is not supported; BPE is")
    pieces = bool(model.get("byte_fallback"))  # as sentencepiece has them
    _check_split(tokenizer, fast, pieces=pieces)
    merges = [
        merge if isinstance(merge, list) else merge.split(" ", 1) for merge in model["merges"]
    ]
    names, types = _tokens(fast, size)
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    writer.add_token_list(names)
    writer.add_token_types(types)
    if pieces:  # merged by score: the earlier a merge, the higher
        first = {"".join(pair): -float(rank) for rank, pair in reversed([*enumerate(merges)])}
        writer.add_token_scores([first.get(name, 0.0) for name in names])
    else:
        writer.add_token_merges([" ".join(pair) for pair in merges])
    for key, name in SPECIAL.items():
        if (number := getattr(tokenizer, f"{name}_id")) is not None:
            writer.add_uint32(f"tokenizer.ggml.{key}", number)
    begins = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    writer.add_add_bos_token(begins)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _check_split(tokenizer: Any, fast: dict[str, Any], *, pieces: bool) -> None:
    if pieces:
        first = tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).tokens[0]
        right = first.startswith("▁")
    else:
        split = fast["pre_tokenizer"] or {}
        right = {key: split.get(key) for key in _GPT2} == _GPT2
    if not right:
        raise TurboSparseError(
            "the tokenizer splits text in a way that llama.cpp of 2023 does not know: it does so "
            "as GPT-2 does, or as sentencepiece with a space before the text"
        )


def _tokens(fast: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Every token of a tokenizer with its type, by id; those that it lacks are unused."""
    names, types = [f"[PAD{number}]" for number in range(size)], [UNUSED] * size
    unknown = fast["model"].get("unk_token")
    added = {token["content"]: token for token in fast["added_tokens"]}
    numbers = fast["model"]["vocab"] | {name: token["id"] for name, token in added.items()}
    for name, number in numbers.items():
        if number >= size:
            raise TurboSparseError(
                f"the tokenizer has the token {name!r} with id {number}, but the model has only "
                f"{size}; use the tokenizer that belongs to the model"
            )
        names[number], types[number] = name, NORMAL
        if name == unknown:
            types[number] = UNKNOWN
        elif name in added:
            types[number] = CONTROL if added[name]["special"] else USER
        elif len(name) == 6 and name.startswith("<0x"):
            types[number] = BYTE
    return names, types
