"""What other programs read: a file that PowerInfer runs, the layout of the paper's models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import VOCABULARY, WINDOW, make_model, merge_predictor
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch.nn.functional import relu, rms_norm, scaled_dot_product_attention

from turbosparse.analyse import analyse
from turbosparse.base.errors import TurboSparseError
from turbosparse.base.folders import read_config, write_json
from turbosparse.convert import convert
from turbosparse.engine.engine import Engine
from turbosparse.export import export
from turbosparse.hf.gguf_writer import add_tokenizer
from turbosparse.hf.load import load_model, load_tokenizer
from turbosparse.pack import pack
from turbosparse.packed.format import Packed

THRESHOLD = -20.0  # about two thirds of the neurons are candidates
SAME_LOGITS = 1e-3  # relative RMS: the engine keeps keys and values in half precision
TEXT = [0, 40, 200, 7, 99, 31, 300, 12, 64, 65, 5, 170]
# of config.json, for what the first Llama and Mistral models compute
PLAIN: dict[str, Any] = {"head_dim": 16, "rope_parameters": {"rope_type": "default"}}
PLAIN["rope_parameters"]["rope_theta"] = 5e4

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """model(family, activation, …): a sparse toy model with a predictor; do not write into it."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def folder(family: str = "mistral", activation: str = "drelu", **settings: Any) -> Path:
        key = (family, activation, *settings.items())
        if key not in made:
            work = root / str(len(made))
            plain = PLAIN | {"tie_word_embeddings": family == "llama", "attention_bias": False}
            make_model(family, work / "dense", **plain)
            convert(str(work / "dense"), work / "sparse", activation=activation)
            block = {"input": "pre_norm", "threshold": THRESHOLD} | settings
            made[key] = merge_predictor(work / "sparse", work / "model", **block)
        return made[key]

    return folder


def read(path: Path) -> gguf.GGUFReader:
    """A PowerInfer file, as its magic says, read as the GGUF file that it otherwise is."""
    raw = path.read_bytes()
    assert raw[:4] == b"PWRI"
    copy = path.with_suffix(".plain")
    copy.write_bytes(b"GGUF" + raw[4:])
    return gguf.GGUFReader(copy)


def numbers(reader: gguf.GGUFReader) -> dict[str, torch.Tensor]:
    """The tensors in float32, ``[rows, …]``."""
    return {
        tensor.name: torch.from_numpy(
            np.array(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
        ).reshape(*map(int, reversed(tensor.shape)))
        for tensor in reader.tensors
    }


def rotate(x: torch.Tensor, base: float) -> torch.Tensor:
    """RoPE as ggml has it, on neighbours; ``[T, heads, width]``."""
    width = x.shape[-1]
    angle = torch.outer(torch.arange(len(x)), base ** (-torch.arange(0, width, 2) / width))
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def powerinfer(reader: gguf.GGUFReader, ids: list[int]) -> torch.Tensor:
    """The logits ``[T, V]`` of the graph that PowerInfer builds of a file."""
    w, fields = numbers(reader), {k: v.contents() for k, v in reader.fields.items()}
    arch = fields["general.architecture"]
    own = {k.removeprefix(f"{arch}."): v for k, v in fields.items()}
    heads, groups = own["attention.head_count"], own["attention.head_count_kv"]
    width = own["embedding_length"] // heads

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return rms_norm(x, x.shape[-1:], w[name], own["attention.layer_norm_rms_epsilon"])

    h = w["token_embd.weight"][ids]
    for layer in range(own["block_count"]):
        b = f"blk.{layer}."
        x = norm(h, f"{b}attn_norm.weight")
        q, k, v = (
            (x @ w[f"{b}attn_{part}.weight"].T).unflatten(-1, (n, width))
            for part, n in {"q": heads, "k": groups, "v": groups}.items()
        )
        q, k = rotate(q, own["rope.freq_base"]), rotate(k, own["rope.freq_base"])
        q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
        seen = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        h = h + seen[0].transpose(0, 1).flatten(1) @ w[f"{b}attn_output.weight"].T
        logits = relu(h @ w[f"{b}fc1.weight"].T) @ w[f"{b}fc2.weight"].T  # before the norm
        x = norm(h, f"{b}ffn_norm.weight")
        gate, up = relu(x @ w[f"{b}ffn_gate.weight"].T), x @ w[f"{b}ffn_up.weight"].T
        active = gate * (relu(up) if arch == "bamboo" else up)
        kept = logits >= fields["powerinfer.sparse_threshold"]
        assert 0.4 < kept.float().mean() < 0.9
        h = h + (active * kept) @ w[f"{b}ffn_down_t.weight"]
    return norm(h, "output_norm.weight") @ w["output.weight"].T


# --- PowerInfer -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "activation", "quant"),
    [("mistral", "drelu", "f16"), ("llama", "reglu", "f16"), ("mistral", "drelu", "q4_0")],
)
def test_powerinfer_computes_what_our_engine_does(
    model: Make, tmp_path: Path, family: str, activation: str, quant: str
) -> None:
    """The same quantised numbers, predictor and all; a tied head is written out."""
    folder, out = model(family, activation), tmp_path / "m.gguf"
    shown = export(str(folder), out, to="powerinfer-gguf", quant=quant)
    assert (shown.bytes, shown.tensors) == (out.stat().st_size, 25)
    ends = f"embedding={quant},head={quant}"
    pack(str(folder), tmp_path / "p", quant=quant, quant_map=ends, predictor_quant=quant)
    engine = Engine(tmp_path / "p", backend="torch", mode="predicted")
    truth = torch.from_numpy(np.concatenate([*engine.logits(TEXT)]))
    found = powerinfer(read(out), TEXT)
    assert float((found - truth).norm() / truth.norm()) < SAME_LOGITS


def test_a_powerinfer_file_has_the_names_and_types_that_it_looks_for(
    model: Make, tmp_path: Path
) -> None:
    export(str(model()), tmp_path / "m.gguf", to="powerinfer-gguf", quant="q4_0")
    reader = read(tmp_path / "m.gguf")
    shapes = {t.name: (t.tensor_type.name, *map(int, t.shape)) for t in reader.tensors}
    for name, shape in {  # the fastest dimension first
        "token_embd.weight": ("Q4_0", 64, VOCABULARY),
        "output.weight": ("Q4_0", 64, VOCABULARY),
        "output_norm.weight": ("F32", 64),
        "blk.0.attn_norm.weight": ("F32", 64),
        "blk.1.attn_k.weight": ("Q4_0", 64, 32),
        "blk.1.attn_output.weight": ("Q4_0", 64, 64),
        "blk.0.ffn_gate.weight": ("Q4_0", 64, 96),
        "blk.0.ffn_up.weight": ("Q4_0", 64, 96),
        "blk.0.ffn_down_t.weight": ("Q4_0", 64, 96),
        "blk.0.fc1.weight": ("Q4_0", 64, 32),
        "blk.1.fc1.weight": ("Q4_0", 64, 64),
        "blk.1.fc2.weight": ("Q4_0", 64, 96),
    }.items():
        assert shapes[name] == shape, name
    assert not any("ffn_down." in name for name in shapes)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.architecture"] == "bamboo"
    assert fields["bamboo.context_length"] == WINDOW  # its attention slides no window
    assert (fields["bamboo.feed_forward_length"], fields["bamboo.rope.freq_base"]) == (96, 5e4)
    assert fields["powerinfer.sparse_threshold"] == THRESHOLD


def test_a_powerinfer_file_is_not_read_back(model: Make, tmp_path: Path) -> None:
    export(str(model()), tmp_path / "m.gguf", to="powerinfer-gguf")
    with pytest.raises(TurboSparseError, match=r"m\.gguf is a file for PowerInfer"):
        pack(str(tmp_path / "m.gguf"), tmp_path / "packed")


def test_the_tokenizer_stands_in_the_file(model: Make, tmp_path: Path) -> None:
    folder = model()
    export(str(folder), tmp_path / "m.gguf", to="powerinfer-gguf")
    fields = {key: f.contents() for key, f in read(tmp_path / "m.gguf").fields.items()}
    own = {k.removeprefix("tokenizer.ggml."): v for k, v in fields.items()}
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    assert own["model"] == "gpt2"
    assert own["tokens"] == list(tokenizer["model"]["vocab"])
    assert own["merges"] == [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    assert own["token_type"][:3] == [3, 3, 1]
    assert (own["bos_token_id"], own["eos_token_id"], own["add_bos_token"]) == (0, 1, True)
    assert fields["tokenizer.chat_template"] == load_tokenizer(folder).chat_template


def pieces() -> Any:
    """A tokenizer as sentencepiece has them: ▁ for a space, and a token for each other byte."""
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", "<0x0A>", *"▁abn", "ab", "an", "▁an", "anan"]
    merges = [("a", "b"), ("a", "n"), ("▁", "an"), ("▁a", "n"), ("an", "an")]
    vocabulary = {name: number for number, name in enumerate([*names, "▁a"])}
    bpe = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True)
    fast = Tokenizer(bpe)
    fast.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    fast.decoder = decoders.ByteFallback()
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def test_pieces_have_scores_in_the_order_of_their_merges(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "llama")
    add_tokenizer(writer, pieces(), 20)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    fields = gguf.GGUFReader(tmp_path / "v.gguf").fields
    own = {k.removeprefix("tokenizer.ggml."): f.contents() for k, f in fields.items()}
    score = dict(zip(own["tokens"], own["scores"], strict=True))
    assert own["model"] == "llama"
    assert score["ab"] > score["an"] > score["▁an"] > score["anan"]
    kinds = dict(zip(own["tokens"], own["token_type"], strict=True))
    assert [kinds[name] for name in ("<unk>", "<s>", "<0x0A>", "an")] == [2, 3, 6, 1]
    assert kinds["[PAD19]"] == 5
    assert (own["unknown_token_id"], own["add_bos_token"]) == (0, False)


# --- predictors -----------------------------------------------------------------------------------


def test_predictors_are_read_by_torch(model: Make, corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model(), folder)
    analyse(str(folder), data=[corpus])
    export(str(folder), tmp_path / "out", to="predictor-pt")
    tensors = load_file(folder / "model.safetensors")
    for layer, rank in enumerate((32, 64)):
        held = torch.load(tmp_path / f"out/model_{layer}.pt", weights_only=True)
        assert held.keys() == {"fc1.weight", "fc2.weight"}
        assert (held["fc1.weight"].shape, held["fc2.weight"].shape) == ((rank, 64), (96, rank))
        for part, matrix in held.items():
            assert torch.equal(matrix, tensors[f"model.layers.{layer}.mlp.predictor.{part}"])
        counts = torch.load(tmp_path / f"out/activation/activation_{layer}.pt", weights_only=True)
        assert counts.shape == (96,)
        assert counts.sum() > 0
    assert read_config(tmp_path / "out") == {"sparse_threshold": THRESHOLD}
    bare = model().parent / "sparse"  # the model without it, and it beside: packed as together
    pack(str(bare), tmp_path / "apart", quant="q8", predictor=str(tmp_path / "out"))
    pack(str(model()), tmp_path / "merged", quant="q8")
    apart, merged = Packed(tmp_path / "apart"), Packed(tmp_path / "merged")
    assert apart.header.ffn == merged.header.ffn
    assert all(np.array_equal(apart.tensors[name], merged.tensors[name]) for name in merged.plan)


# --- the paper's models ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "reads", "kind"),
    [
        ("mistral", "pre_norm", "bamboo"),
        ("llama", "pre_norm", "bamboo"),
        ("mixtral", "post_norm", "turbosparsemixtral"),
    ],
)
def test_the_published_layout(
    model: Make, tmp_path: Path, family: str, reads: str, kind: str
) -> None:
    folder = model(family, input=reads, threshold=0.0)
    export(str(folder), tmp_path / "out", to="turbosparse")
    config = read_config(tmp_path / "out")
    assert (config["model_type"], config["hidden_act"]) == (kind, "relu")
    assert config["architectures"] == [
        {"bamboo": "Bamboo", "turbosparsemixtral": "TurboSparseMixtral"}[kind] + "ForCausalLM"
    ]
    assert (config["rope_theta"], config["torch_dtype"]) == (5e4, "float32")
    assert config["sliding_window"] == (WINDOW if family == "mistral" else None)
    assert not {"auto_map", "ffn_activation", "predictor", "rope_parameters"} & config.keys()
    held = load_file(tmp_path / "out" / "model.safetensors")
    truth = load_file(folder / "model.safetensors")
    assert held.keys() == truth.keys()
    assert all(torch.equal(held[name], truth[name]) for name in held)
    ffn = "block_sparse_moe.experts.3" if family == "mixtral" else "mlp"
    assert f"model.layers.1.{ffn}.predictor.fc2.weight" in held
    assert load_tokenizer(folder)("boats") == load_tokenizer(tmp_path / "out")("boats")
    for name, source in (("back", tmp_path / "out"), ("first", folder)):  # read again, packed
        pack(str(source), tmp_path / name, quant="q8")
    back, first = Packed(tmp_path / "back"), Packed(tmp_path / "first")
    assert back.header.ffn.predictor.input == reads
    assert back.activation == "drelu"
    assert all(np.array_equal(back.tensors[name], first.tensors[name]) for name in first.plan)
    logits = [
        load_model(source)(torch.tensor([TEXT])).logits for source in (tmp_path / "out", folder)
    ]
    assert torch.equal(*logits)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "activation", "settings", "to", "message"),
    [
        ("mixtral", "drelu", {}, "powerinfer-gguf", "runs no mixture of experts"),
        ("mistral", "relu", {}, "powerinfer-gguf", "drelu and reglu, not relu"),
        ("mistral", "drelu", {"input": "post_norm"}, "powerinfer-gguf", "reads post_norm"),
        ("mistral", "drelu", {"input": "post_norm"}, "predictor-pt", "reads post_norm"),
        ("qwen2", "drelu", {}, "powerinfer-gguf", "no biases in attention"),
        ("qwen2", "drelu", {"threshold": 0.0}, "turbosparse", "not drelu qwen2"),
        ("mistral", "reglu", {"threshold": 0.0}, "turbosparse", "not reglu mistral"),
        ("mistral", "drelu", {"threshold": 1.0}, "turbosparse", "reads pre_norm with threshold 1"),
        ("mixtral", "drelu", {"threshold": 0.0}, "turbosparse", "reads post_norm with threshold 0"),
    ],
)
def test_what_another_program_cannot_run_is_refused(
    model: Make,
    tmp_path: Path,
    family: str,
    activation: str,
    settings: dict[str, Any],
    to: Any,
    message: str,
) -> None:
    with pytest.raises(TurboSparseError, match=message):
        export(str(model(family, activation, **settings)), tmp_path / "out", to=to)
    assert not any(tmp_path.iterdir())


def edited(model: Path, folder: Path, **fields: object) -> Path:
    shutil.copytree(model, folder)
    write_json(folder / "config.json", read_config(folder) | fields)
    return folder


@pytest.mark.parametrize("to", ["powerinfer-gguf", "turbosparse"])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            r"does not scale RoPE as this model does \(linear\)",
        ),
        ({"ffn_threshold": 0.01}, "no threshold for gates, this model has 0.01"),
    ],
)
def test_settings_that_other_programs_lack_are_refused(
    model: Make, tmp_path: Path, to: Any, fields: dict[str, Any], message: str
) -> None:
    folder = edited(model(threshold=0.0), tmp_path / "model", **fields)
    with pytest.raises(TurboSparseError, match=message):
        export(str(folder), tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()


def test_a_head_of_its_own_size_is_refused(sparse: Make, tmp_path: Path) -> None:
    folder = merge_predictor(sparse("mistral"), tmp_path / "m", input="pre_norm", threshold=0.0)
    for to in ("powerinfer-gguf", "turbosparse"):
        with pytest.raises(TurboSparseError, match="a head size of 16, this model has 24"):
            export(str(folder), tmp_path / "out", to=to)


def test_without_a_predictor(sparse: Make, model: Make, tmp_path: Path) -> None:
    """Bamboo's own folders hold none; PowerInfer needs one, and so does the published Mixtral."""
    for family, to in (("mistral", "powerinfer-gguf"), ("mixtral", "turbosparse")):
        with pytest.raises(TurboSparseError, match="needs a predictor, and the model holds none"):
            export(str(sparse(family)), tmp_path / "out", to=to)
    bare = model().parent / "sparse"
    export(str(bare), tmp_path / "bamboo", to="turbosparse")
    assert read_config(tmp_path / "bamboo")["model_type"] == "bamboo"


def test_numbers_beyond_half_precision_are_refused(model: Make, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model(), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TurboSparseError, match=r"layers\.1\.mlp\.up_proj\.weight holds"):
        export(str(folder), tmp_path / "out", to="powerinfer-gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_packed_folder_names_its_source(model: Make, tmp_path: Path) -> None:
    pack(str(model()), tmp_path / "packed")
    with pytest.raises(TurboSparseError, match=f"packed from, {model()}"):
        export(str(tmp_path / "packed"), tmp_path / "out", to="turbosparse")


def test_a_tokenizer_that_splits_in_another_way_is_refused(model: Make, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model(), folder)
    fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
    digits = pre_tokenizers.Digits(individual_digits=True)
    fast.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(False)])
    fast.save(str(folder / "tokenizer.json"))
    with pytest.raises(TurboSparseError, match="splits text in a way"):
        export(str(folder), tmp_path / "out", to="powerinfer-gguf")
    assert not (tmp_path / "out").exists()
