"""GGUF files of the supported architectures, written with the `gguf` package; what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file
from tokenizers import Tokenizer

from turbosparse.base.errors import TurboSparseError
from turbosparse.convert import convert
from turbosparse.hf import families
from turbosparse.hf.config import read_model_config
from turbosparse.hf.gguf import gguf_table, import_gguf
from turbosparse.hf.hub import model_folder
from turbosparse.hf.load import load_tokenizer
from turbosparse.ops.quant import dequantise, quantise
from turbosparse.pack import pack

ARCHITECTURE = {"mixtral": "llama"} | {
    name: name for name in ("llama", "qwen2", "arcee", "nemotron")
}
PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}
CHANGES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True, **PLAIN},
    "qwen2": {"use_sliding_window": False, "head_dim": 16, **PLAIN},
    "mixtral": {"head_dim": 16, **PLAIN},
    "arcee": {"attention_bias": False},  # YaRN, as AFM has it
    "nemotron": {"attention_bias": True},
}
Q4_0, Q8_0 = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q8_0


def pair_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp's converter stores q and k: the two of a rotation side by side."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(folder: Path, path: Path, kind: Any = None, **more: Any) -> dict[str, np.ndarray]:
    """The toy model of `folder` as a GGUF file, matrices in `kind`; returns what it stands for."""
    config, raw = read_model_config(folder), json.loads((folder / "config.json").read_text())
    arch = ARCHITECTURE[config.model_type]
    weights = {
        name: w.float().numpy() for name, w in load_file(folder / "model.safetensors").items()
    }
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    scaling = config.rope_parameters
    if "factor" in scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling["rope_type"]))
        writer.add_rope_scaling_factor(scaling["factor"])
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    if arch == "nemotron":
        writer.add_layer_norm_eps(config.norm_eps)
        writer.add_rope_dimension_count(config.head_dim // 2)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.num_local_experts:
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(raw["num_experts_per_tok"])
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokens = list(tokenizer["model"]["vocab"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(more.get("pre", "gpt-2"))
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(True)
    if "template" in more:
        writer.add_chat_template((folder / "chat_template.jinja").read_text())
    for key, value in more.get("settings", {}).items():
        writer.add_float32(f"{arch}.{key}", value)
    meant, table = {}, families.table(config)
    for tensor in gguf_table(config).tensors(config):
        experts = range(config.num_local_experts) if "exps" in tensor.name else [None]
        names = [table.name(tensor.role, tensor.layer, expert) for expert in experts]
        parts = [weights[name] for name in names]
        heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
        if arch == "nemotron" and "norm.weight" in tensor.name:  # whole, not less by one
            parts = [parts[0] + 1]
            weights[names[0]] = parts[0] - 1
        if arch in ("llama", "arcee") and tensor.role.removesuffix(".bias") in heads:
            parts = [pair_order(parts[0], heads[tensor.role[0]])]
        stack = np.stack(parts) if experts != [None] else parts[0]
        if kind is not None and tensor.row.packed != "float":
            blocks = gguf.quantize(stack, kind)
            writer.add_tensor(tensor.name, blocks, raw_dtype=kind)
            stack = gguf.dequantize(blocks, kind)
        else:
            writer.add_tensor(tensor.name, stack.astype(np.float32))
        for name, part in zip(names, stack if experts != [None] else [stack], strict=True):
            meant[name] = part
    if "tensor" in more:
        writer.add_tensor(more["tensor"], np.ones(3, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights if kind is None else meant


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = make_model(
                family, tmp_path_factory.mktemp("toy") / family, **CHANGES[family]
            )
        return made[family]

    return folder


@pytest.mark.parametrize("family", ARCHITECTURE)
def test_a_gguf_file_holds_the_model_that_it_was_made_of(
    toy: Any, family: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    weights = write_gguf(toy(family), tmp_path / "m.gguf")
    import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    read = load_file(tmp_path / "out" / "model.safetensors")
    assert read.keys() == {
        tensor.name for tensor in families.tensors(read_model_config(toy(family)))
    }
    assert all(np.array_equal(read[name].numpy(), weights[name]) for name in read)
    ids = torch.tensor([[0, 5, 40, 200, 7]])
    logits = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
        for folder in (toy(family), tmp_path / "out")
    ]
    assert torch.equal(*logits)
    text = "Boats 12 and\n 345 gulls, naïve 🙂"
    mine, theirs = load_tokenizer(tmp_path / "out"), load_tokenizer(toy(family))
    assert mine(text)["input_ids"] == theirs(text)["input_ids"]
    assert (mine.bos_token, mine.eos_token) == ("<s>", "</s>")


@pytest.mark.parametrize(("kind", "quant"), [(Q4_0, "q4_0"), (Q8_0, "q8")])
def test_packing_gives_back_the_numbers_of_the_file(
    toy: Any, tmp_path: Path, kind: Any, quant: str
) -> None:
    meant = write_gguf(toy("qwen2"), tmp_path / "m.gguf", kind)
    import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    read = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in read.items():
        assert np.array_equal(weight.numpy(), meant[name]), name
        if weight.dim() == 2:
            again = dequantise(quantise(weight, quant), quant, weight.shape[1])
            assert torch.equal(again, weight), name


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"pre": "chameleon"}, "tokenizer.ggml.pre is 'chameleon'"),
        ({"settings": {"attention.scale": 2.0}}, "llama.attention.scale is a setting"),
        ({"tensor": "blk.0.attn_sinks.weight"}, "not supported: blk.0.attn_sinks.weight"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(
    toy: Any, tmp_path: Path, more: dict[str, Any], message: str
) -> None:
    write_gguf(toy("llama"), tmp_path / "m.gguf", **more)
    with pytest.raises(TurboSparseError, match=message):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5])
def test_a_damaged_file_is_an_error(toy: Any, tmp_path: Path, share: float) -> None:
    write_gguf(toy("llama"), tmp_path / "m.gguf")
    raw = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(TurboSparseError, match="download"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")


def test_numbers_are_split_one_digit_at_a_time_for_smollm(toy: Any, tmp_path: Path) -> None:
    write_gguf(toy("llama"), tmp_path / "m.gguf", pre="smollm")
    import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    fast = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert fast.encode("1995", add_special_tokens=False).tokens == list("1995")


def test_a_file_is_a_model_for_every_verb(
    toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """It is imported once, and again when it has changed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "m.gguf"
    write_gguf(toy("llama"), file, Q4_0)
    pack(str(file), tmp_path / "packed", quant="q8")
    convert(str(file), tmp_path / "drelu")
    assert capsys.readouterr().err.count("importing m.gguf") == 1
    assert read_model_config(tmp_path / "drelu").ffn_activation == "drelu"
    write_gguf(toy("llama"), file, Q8_0)
    assert model_folder(file) != model_folder(toy("llama"))
    assert len(list((tmp_path / "cache" / "turbosparse" / "gguf").iterdir())) == 2
