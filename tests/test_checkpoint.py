"""Whatever a model folder holds, every verb reads the same weights of it, or says why it cannot."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EVERY, make_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from turbosparse.analyse import analyse
from turbosparse.base.errors import TurboSparseError
from turbosparse.base.folders import read_config, write_json
from turbosparse.convert import convert
from turbosparse.hf.checkpoint import INDEX, SINGLE, Checkpoint
from turbosparse.hf.hub import model_folder
from turbosparse.hf.load import check_ids, load_config, load_model, load_tokenizer
from turbosparse.pack import pack

Make = Callable[[str], Path]
Change = Callable[[Path], Any]
Q, UP = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def edit(folder: Path, **fields: object) -> None:
    write_json(folder / "config.json", read_config(folder) | fields)


def weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def to(dtype: torch.dtype) -> Change:
    return lambda f: weights(f, lambda t: t.update({UP: t[UP].to(dtype)}))


def add(name: str, tensor: torch.Tensor) -> Change:
    return lambda f: weights(f, lambda t: t.update({name: tensor}))


def shard(folder: Path, first: str = "model-00001-of-00002.safetensors") -> None:
    """Two shards with an index, as large models have."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    homes = {name: first if name == Q else "model-00002-of-00002.safetensors" for name in tensors}
    for file in set(homes.values()):
        held = {name: tensors[name] for name in tensors if homes[name] == file}
        save_file(held, folder / file, metadata={"format": "pt"})
    write_json(folder / INDEX, {"metadata": {}, "weight_map": homes})


def both(folder: Path) -> None:
    shutil.copy(folder / SINGLE, folder / "kept")
    shard(folder)
    (folder / "kept").rename(folder / SINGLE)


def twice(folder: Path) -> None:
    shard(folder)
    file = folder / "model-00002-of-00002.safetensors"
    save_file(load_file(file) | {Q: torch.ones(96, 64)}, file, metadata={"format": "pt"})


def lone(name: str) -> Change:
    return lambda f: (f / SINGLE).rename(f / name)


def point(folder: Path, name: str) -> None:
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def outside(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer_config.json").symlink_to(folder.parent / "secret.json")
    (folder.parent / "secret.json").write_text("{}")


def indexed(text: str) -> Change:
    return lambda f: (f / INDEX).write_text(text)


REFUSED: dict[str, tuple[Change, str]] = {
    "fp8 scales": (
        lambda f: edit(f, quantization_config={"quant_method": "fp8"}),
        "the weights are quantised (fp8)",
    ),
    "gptq": (
        lambda f: edit(f, quantization_config={"quant_method": "gptq", "bits": 4}),
        "the weights are quantised (gptq)",
    ),
    "compressed": (lambda f: edit(f, compression_config=[1]), "the weights are quantised ([1])"),
    "fp8": (to(torch.float8_e4m3fn), f"{UP} is of type F8_E4M3"),
    "int8": (to(torch.int8), f"{UP} is of type I8"),
    "uint8": (to(torch.uint8), f"{UP} is of type U8"),
    "int64": (to(torch.int64), f"{UP} is of type I64"),
    "bool": (to(torch.bool), f"{UP} is of type BOOL"),
    "complex": (to(torch.complex64), f"{UP} is of type C64"),
    "a scale": (add(f"{UP}_scale", torch.ones(1)), f"does not call for {UP}_scale"),
    "a bias": (
        add("model.layers.1.mlp.up_proj.bias", torch.zeros(96)),
        "does not call for model.layers.1.mlp.up_proj.bias",
    ),
    "a layer more": (add("model.layers.2.mlp.up_proj.weight", torch.ones(96, 64)), "layers.2"),
    "index and file": (both, f"holds both {SINGLE} and {INDEX}"),
    "one tensor twice": (twice, f"{Q} stands in model-00001-of-00002.safetensors and in"),
    "shards alone": (
        lambda f: (shard(f), (f / INDEX).unlink()),
        f"it has shards but not their {INDEX}",
    ),
    "adapter": (lone("adapter_model.safetensors"), "it is a LoRA adapter"),
    "weights with adapter": (
        lambda f: (f / "adapter_config.json").write_text("{}"),
        "an adapter to them",
    ),
    "consolidated": (lone("consolidated.safetensors"), "in Mistral's own form"),
    "gguf": (lone("model.gguf"), "it holds GGUF weights"),
    "pickled": (lone("pytorch_model.bin"), "it holds pickled .bin weights"),
    "other name": (lone("weights.safetensors"), "its weights have other names"),
    "pointer": (lambda f: point(f, SINGLE), "is a pointer of Git LFS"),
    "pointer for a tokenizer": (lambda f: point(f, "tokenizer.json"), "is a pointer of Git LFS"),
    "broken tokenizer": (
        lambda f: (f / "tokenizer.json").write_text("{}"),
        "the tokenizer cannot be loaded",
    ),
    "broken sentencepiece": (
        lambda f: (f / "tokenizer.json").rename(f / "tokenizer.model"),
        "the tokenizer cannot be loaded",
    ),
    "length of a tokenizer": (
        lambda f: write_json(
            f / "tokenizer_config.json",
            read_config(f, "tokenizer_config.json") | {"model_max_length": "I32"},
        ),
        "the tokenizer cannot be loaded",
    ),
    "link outside": (outside, "is a link to"),
    "path up": (indexed('{"weight_map": {"a": "../m.safetensors"}}'), "names '../m.safetensors'"),
    "path down": (indexed('{"weight_map": {"a": "b/m.safetensors"}}'), "names 'b/m.safetensors'"),
    "path of Windows": (indexed('{"weight_map": {"a": "b\\\\m.safetensors"}}'), "not a safet"),
    "absolute path": (indexed('{"weight_map": {"a": "/m.safetensors"}}'), "'/m.safetensors'"),
    "no shards": (indexed('{"weight_map": {}}'), "it has no weight_map"),
    "deep index": (indexed("[" * 100_000), f"{INDEX} is not valid JSON"),
    "dynamic RoPE": (
        lambda f: edit(f, rope_parameters={"rope_type": "dynamic", "factor": 2.0}),
        "rope_type is 'dynamic'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_no_verb_reads_the_wrong_weights(dense: Make, tmp_path: Path, case: str) -> None:
    change, message = REFUSED[case]
    folder = tmp_path / "model"
    shutil.copytree(dense("mistral"), folder)
    change(folder)

    def load(source: str, _out: Path) -> None:
        load_tokenizer(source)
        load_model(source)

    there = set(tmp_path.iterdir())
    for verb in (convert, pack, load):
        with pytest.raises(TurboSparseError) as error:
            verb(str(folder), tmp_path / "out")
        assert message in str(error.value)
    assert set(tmp_path.iterdir()) == there


@pytest.mark.parametrize("change", [shard, add("model.rotary_emb.inv_freq", torch.ones(8))])
def test_other_forms_of_the_same_weights(dense: Make, tmp_path: Path, change: Change) -> None:
    folder = tmp_path / "model"
    shutil.copytree(dense("mistral"), folder)
    change(folder)
    expected = load_file(dense("mistral") / SINGLE)
    convert(str(folder), tmp_path / "drelu")
    found = load_model(tmp_path / "drelu").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_tied_head_of_its_own_is_not_dropped(dense: Make, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(dense("llama"), folder)
    weights(folder, lambda t: t.update({HEAD: t[EMBEDDING].clone()}))
    pack(str(folder), tmp_path / "tied", quant="f16")  # the same content is harmless
    weights(folder, lambda t: t[HEAD].mul_(2))
    for verb in (convert, pack):
        with pytest.raises(TurboSparseError, match="says tie_word_embeddings, but lm_head"):
            verb(str(folder), tmp_path / "out")
    edit(folder, tie_word_embeddings=False)
    pack(str(folder), tmp_path / "untied", quant="f16")


@pytest.mark.parametrize("family", EVERY)
def test_biases_belong_to_the_family(tmp_path: Path, family: str) -> None:
    folder = make_model(family, tmp_path / "model")
    config = load_config(folder)
    bias = "model.layers.0.self_attn.q_proj.bias"
    held = bias in Checkpoint(folder)
    weights(folder, lambda t: t.update({bias: torch.zeros(t[Q].shape[0])}))
    if held:
        Checkpoint(folder).check(config)
    else:
        with pytest.raises(TurboSparseError, match=bias):
            Checkpoint(folder).check(config)


def test_a_config_fetches_no_code(dense: Make, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(dense("mistral"), folder)
    code = "a/b"
    edit(folder, attn_implementation=code, _attn_implementation=code, experts_implementation=code)
    edit(folder, _attn_implementation_internal=code)
    assert load_model(folder).config._attn_implementation != code


def test_a_sentencepiece_model_alone_is_a_tokenizer(dense: Make, tmp_path: Path) -> None:
    import sentencepiece

    folder = tmp_path / "model"
    shutil.copytree(dense("llama"), folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((Path(__file__).parents[1] / "LICENSE").read_text().splitlines()),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    expected = load_tokenizer(folder)("free software")["input_ids"]
    pack(str(folder), tmp_path / "packed")
    assert (
        Tokenizer.from_file(str(tmp_path / "packed" / "tokenizer.json")).encode("free software").ids
        == expected
    )


def test_a_token_beyond_the_embedding_is_named(dense: Make) -> None:
    tokenizer = load_tokenizer(dense("mistral"))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    ids = tokenizer("boats [PAD]")["input_ids"]
    with pytest.raises(TurboSparseError, match=r"the token '\[PAD\]' with id 320, but the model"):
        check_ids(ids, tokenizer, 320)
    assert check_ids(ids, tokenizer, 321) == ids


def test_the_hub_is_asked_for_what_the_index_names(
    dense: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = tmp_path / "models--org--name" / "snapshots" / "c0ffee"
    shutil.copytree(dense("mistral"), commit)
    shard(commit)
    asked: list[tuple[str, str | None, list[str]]] = []

    def download(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repository, revision, allow_patterns))
        return str(commit)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert model_folder("org/name@v1.2") == commit
    assert [entry[:2] for entry in asked] == [("org/name", "v1.2"), ("org/name", "c0ffee")]
    assert {"config.json", INDEX, "tokenizer.json"} < set(asked[0][2])
    assert not any("*" in pattern for pattern in asked[0][2])
    assert asked[1][2] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    # links of the cache lead to its own blobs
    blobs = commit.parent.parent / "blobs"
    blobs.mkdir()
    (commit / "tokenizer.json").rename(blobs / "ab12")
    (commit / "tokenizer.json").symlink_to("../../blobs/ab12")
    assert json.loads((commit / "tokenizer.json").read_text())
    load_tokenizer(commit)


def test_weights_run_as_what_they_are(dense: Make, merged: Path, tmp_path: Path) -> None:
    packed = pack(str(dense("qwen2")), tmp_path / "packed", activation="reglu")
    assert packed.activation == "reglu"
    config = read_config(tmp_path / "packed")
    assert (config["model_type"], config["ffn_activation"]) == ("drelu_qwen2", "reglu")
    text = tmp_path / "text.txt"
    text.write_text("The small boats and the gulls went home.")
    found = analyse(str(dense("qwen2")), data=[text], out=tmp_path, activation="drelu")
    assert found.activation == "drelu"
    assert found.activation_sparsity > 0.5
    record = pack(str(merged), tmp_path / "other", predictor_input="post_norm").predictor
    assert record
    block = read_config(tmp_path / "other")["turbosparse"]["ffn"]["predictor"]
    assert block["input"] == "post_norm"
    with pytest.raises(TurboSparseError, match="--predictor-input is for a merged predictor"):
        pack(str(dense("qwen2")), tmp_path / "none", predictor_input="pre_norm")


def test_measuring_names_a_token_beyond_the_embedding(dense: Make, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(dense("mistral"), folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    (tmp_path / "text.txt").write_text("The small boats [PAD] went home. " * 40)
    with pytest.raises(TurboSparseError, match=r"'\[PAD\]' with id 320"):
        analyse(str(folder), data=[tmp_path / "text.txt"], out=tmp_path)
    with pytest.raises(TurboSparseError, match=r"'\[PAD\]' with id 320"):
        convert(str(folder), tmp_path / "out", data=[tmp_path / "text.txt"], tokens=160)
    assert not (tmp_path / "out").exists()


def resident_file_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssFile:\s+(\d+)", status)[1]) << 10  # type: ignore[index]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_what_was_read_does_not_stay_in_memory(tmp_path: Path) -> None:
    size, count = 8 << 20, 8
    tensors = {str(n): torch.zeros(size // 4) for n in range(count)}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    before = resident_file_bytes()
    for name in checkpoint:
        checkpoint[name].sum()
    assert resident_file_bytes() - before < 2 * size
