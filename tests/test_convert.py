"""Conversion: the same weights under another activation, usable with and without our package."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from conftest import FAMILIES, NATIVE
from safetensors.torch import load_file, save_file
from torch.nn.functional import gelu, relu, silu
from transformers import AutoModelForCausalLM

from turbosparse.base.errors import TurboSparseError
from turbosparse.convert import convert
from turbosparse.hf.load import load_model, quiet, register

Make = Callable[..., Path]
TOKENS = torch.arange(4, 44).reshape(2, 20)
ACTIVATIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "drelu": lambda gate, up: relu(gate) * relu(up),
    "geglu": lambda gate, up: gelu(gate) * up,
    "reglu": lambda gate, up: relu(gate) * up,
    "relu": lambda _gate, up: relu(up),
    "relu2": lambda _gate, up: relu(up) ** 2,
    "swiglu": lambda gate, up: silu(gate) * up,
}
SAME_LOGITS = 1e-5  # relative RMS between float32 sums in another order


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def edit_config(folder: Path, **changes: object) -> Path:
    (folder / "config.json").write_text(json.dumps(config_of(folder) | changes))
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    shards = [load_file(path) for path in folder.glob("*.safetensors")]
    return {name: tensor for shard in shards for name, tensor in shard.items()}


def load(folder: Path) -> Any:
    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.inference_mode()
def logits_of(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(TOKENS).logits
    return logits


def relative_rms(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value - truth).norm() / truth.norm())


@functools.cache
def by_hand(dense: Path, activation: str) -> torch.Tensor:
    """Logits of the stock model with every FFN written out over the tensors on disk."""
    model, tensors = load(dense), tensors_of(dense)
    combined = ACTIVATIONS[activation]

    def ffn(x: torch.Tensor, prefix: str, gate: str, up: str, down: str) -> torch.Tensor:
        w_gate, w_up, w_down = (tensors[f"{prefix}.{name}.weight"] for name in (gate, up, down))
        return combined(x @ w_gate.T, x @ w_up.T) @ w_down.T

    def experts(x: torch.Tensor, prefix: str) -> torch.Tensor:
        rows = x.flatten(0, 1)
        shares = (rows @ tensors[f"{prefix}.gate.weight"].T).softmax(-1)
        out = torch.zeros_like(rows)
        for row, (token, share) in enumerate(zip(rows, shares, strict=True)):
            best = share.topk(2)
            for expert, weight in zip(best.indices.tolist(), best.values, strict=True):
                y = ffn(token, f"{prefix}.experts.{expert}", "w1", "w3", "w2")
                out[row] += weight / best.values.sum() * y
        return out.reshape(x.shape)

    for number, layer in enumerate(model.model.layers):
        at = f"model.layers.{number}"
        if f"{at}.block_sparse_moe.gate.weight" in tensors:
            layer.mlp.forward = lambda x, at=at: experts(x, f"{at}.block_sparse_moe")
        else:
            layer.mlp.forward = lambda x, at=at: ffn(
                x, f"{at}.mlp", "gate_proj", "up_proj", "down_proj"
            )
    return logits_of(model)


# --- what a converted folder holds ----------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_weights_are_bit_identical(dense: Make, sparse: Make, family: str) -> None:
    before, after = tensors_of(dense(family)), tensors_of(sparse(family))
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_config_names_our_class_and_keeps_the_rest(
    dense: Make, sparse: Make, family: str
) -> None:
    before, after = config_of(dense(family)), config_of(sparse(family))
    title, file = family.title(), "modeling_drelu" + "_moe" * (family == "mixtral")
    changed = {
        "model_type": f"drelu_{family}",
        "architectures": [f"DReLU{title}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{file}.DReLU{title}Config",
            "AutoModelForCausalLM": f"{file}.DReLU{title}ForCausalLM",
        },
        "hidden_act": "relu",
        "ffn_activation": "drelu",
        "ffn_threshold": 0.0,
        "turbosparse": {"converted_from": str(dense(family)), "activation": "drelu"},
    }
    assert after == before | changed


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"],
)
def test_tokenizer_and_generation_settings_travel(dense: Make, sparse: Make, name: str) -> None:
    assert (sparse("qwen2") / name).read_bytes() == (dense("qwen2") / name).read_bytes()


@pytest.fixture(scope="module")
def sharded(dense: Make, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """sharded(family): the dense toy model in bf16 and several shards."""
    root = tmp_path_factory.mktemp("sharded")

    def folder(family: str) -> Path:
        path = root / family
        if not path.exists():
            model = load(dense(family)).bfloat16()
            copytree(dense(family), path, ignore=lambda *_: ["model.safetensors"])
            with quiet():
                model.save_pretrained(path, max_shard_size="120KB")
        return path

    return folder


@pytest.mark.parametrize("family", ["mistral", "mixtral"])
def test_shards_and_bf16_stay_as_they_are(sharded: Make, tmp_path: Path, family: str) -> None:
    source, out = sharded(family), tmp_path / "out"
    written = convert(str(source), out)
    shards = sorted(path.name for path in source.glob("*.safetensors"))
    assert written.shards == len(shards) > 1
    for name in [*shards, "model.safetensors.index.json"]:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert load_model(out).dtype == torch.bfloat16


def test_parameters_are_counted(dense: Make, tmp_path: Path) -> None:
    written = convert(str(dense("qwen2")), tmp_path / "out")
    expected = sum(tensor.numel() for tensor in tensors_of(dense("qwen2")).values())
    assert written.parameters == expected
    assert f"{expected / 1e6:.2f} M parameters, 1 shard." in str(written)


def test_link_shares_the_weights_and_copy_does_not(dense: Make, tmp_path: Path) -> None:
    original = dense("mistral") / "model.safetensors"
    convert(str(dense("mistral")), tmp_path / "copied")
    convert(str(dense("mistral")), tmp_path / "linked", link=True)
    assert (tmp_path / "linked" / "model.safetensors").samefile(original)
    assert not (tmp_path / "copied" / "model.safetensors").samefile(original)
    assert not (tmp_path / "linked" / "tokenizer.json").samefile(
        dense("mistral") / "tokenizer.json"
    )


# --- what a converted model computes --------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_drelu_written_by_hand(dense: Make, sparse: Make, family: str) -> None:
    register()
    logits, truth = logits_of(load(sparse(family))), by_hand(dense(family), "drelu")
    assert relative_rms(logits, truth) < SAME_LOGITS
    assert relative_rms(logits_of(load(dense(family))), truth) > 0.01, "SwiGLU must differ"


@pytest.mark.parametrize("activation", ["geglu", "reglu", "relu", "relu2"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_other_activations_are_those_written_by_hand(
    dense: Make, sparse: Make, family: str, activation: str
) -> None:
    folder = sparse(family, activation)
    assert config_of(folder)["ffn_activation"] == activation
    assert config_of(folder)["hidden_act"] == {"geglu": "gelu", "relu2": "relu2"}.get(
        activation, "relu"
    )
    register()
    assert relative_rms(logits_of(load(folder)), by_hand(dense(family), activation)) < SAME_LOGITS


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("activation", ["drelu", "geglu", "reglu"])
def test_every_experts_implementation_agrees(
    dense: Make, sparse: Make, activation: str, implementation: str
) -> None:
    model = load_model(sparse("mixtral", activation)).eval()
    model.set_experts_implementation(implementation)
    assert relative_rms(logits_of(model), by_hand(dense("mixtral"), activation)) < SAME_LOGITS


@pytest.mark.parametrize("family", ["qwen2", "mixtral"])
def test_swiglu_keeps_the_stock_class_and_logits(dense: Make, sparse: Make, family: str) -> None:
    folder = sparse(family, "swiglu")
    assert not list(folder.glob("*.py"))
    model = load(folder)
    assert type(model).__name__ == f"{family.title()}ForCausalLM"
    assert torch.equal(logits_of(model), logits_of(load(dense(family))))


@pytest.mark.parametrize("family", NATIVE)
def test_a_model_that_was_made_sparse_is_only_copied(
    dense: Make, tmp_path: Path, family: str
) -> None:
    done = convert(str(dense(family)), tmp_path / "out")
    assert (done.model_type, done.activation) == (family, "relu2")
    assert torch.equal(logits_of(load(tmp_path / "out")), logits_of(load(dense(family))))
    assert not list((tmp_path / "out").glob("*.py"))
    message = "is not a dense SwiGLU model, but relu2: --activation drelu would make another"
    refused(dense(family), tmp_path / "no", message, activation="drelu")


WITHOUT_US = """
import sys
sys.modules["turbosparse"] = None  # as if it were not installed
import torch
from transformers import AutoModelForCausalLM
tokens, out, folders = torch.load(sys.argv[1]), sys.argv[2], sys.argv[3:]
for trust in ({}, {"trust_remote_code": False}):
    try:
        AutoModelForCausalLM.from_pretrained(folders[0], **trust)
    except ValueError as error:
        assert "trust_remote_code" in str(error), error
    else:
        raise SystemExit("loaded foreign code without being asked to")
with torch.inference_mode():
    models = [AutoModelForCausalLM.from_pretrained(f, trust_remote_code=True) for f in folders]
    torch.save([model.eval()(tokens).logits for model in models], out)
"""


def test_a_converted_model_runs_without_our_package(sparse: Make, tmp_path: Path) -> None:
    """`trust_remote_code=True` gives the same logits; without it there is a loud error."""
    torch.save(TOKENS, tmp_path / "tokens")
    folders = [sparse(family) for family in FAMILIES]
    subprocess.run(
        [sys.executable, "-c", WITHOUT_US, tmp_path / "tokens", tmp_path / "logits", *folders],
        check=True,
        stdin=subprocess.DEVNULL,
        cwd=tmp_path,
        env=os.environ | {"HF_HOME": str(tmp_path / "cache")},
    )
    for folder, logits in zip(folders, torch.load(tmp_path / "logits"), strict=True):
        assert torch.equal(logits, logits_of(load_model(folder).eval())), folder


# --- refusals, with nothing left behind -----------------------------------------------------------


def remove_tensor(folder: Path, name: str) -> Path:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def remove(folder: Path, pattern: str) -> Path:
    sorted(folder.glob(pattern))[0].unlink()
    return folder


def rewrite(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder


def pickled(folder: Path) -> Path:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return folder


NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
INDEX = "model.safetensors.index.json"
# what is wrong: (how a copy of a toy model becomes the source, what the message must hold)
MISTAKES: dict[str, tuple[Callable[[Path], str | Path], str]] = {
    "missing folder": (lambda f: f / "x" / "y", "no such folder: {source}; give a model folder or"),
    "path typo": (lambda _: "./modles/mistral", "no such folder: ./modles/mistral; give a model"),
    "hub id offline": (
        lambda _: "no-such-org/no-such-model",
        "no-such-org/no-such-model is not a local folder, and downloading it from the hub failed",
    ),
    "file": (lambda f: f / "config.json", "is a file; give the folder that holds it"),
    "no config": (lambda f: remove(f, "config.json"), "{source} has no config.json; give the"),
    "broken config": (lambda f: rewrite(f, "config.json", "{oh"), "config.json is not valid JSON"),
    "config no object": (lambda f: rewrite(f, "config.json", "[]"), "holds a list, not a JSON obj"),
    "unknown architecture": (
        lambda f: edit_config(f, model_type="gpt2"),
        "'gpt2' is not supported; supported are mistral, llama, qwen2, mixtral, arcee, nemotron,",
    ),
    "impossible size": (
        lambda f: edit_config(f, num_hidden_layers=10**9),
        "num_hidden_layers is 1000000000: Input should be less than",
    ),
    "size of the wrong type": (
        lambda f: edit_config(f, rms_norm_eps="x"),
        "config.json is not val",
    ),
    "not SwiGLU": (
        lambda f: edit_config(f, hidden_act="relu"),
        "hidden_act 'relu' does not say which feed-forward",
    ),
    "unknown activation": (
        lambda f: edit_config(f, hidden_act="gelu_new"),
        "hidden_act 'gelu_new' is not supported; known are relu, silu, swish",
    ),
    "no tokenizer": (lambda f: remove(f, "tokenizer.json"), "has no tokenizer (tokenizer.json, "),
    "tensor missing": (
        lambda f: remove_tensor(f, UP),
        f"disagree: {UP} is missing; use the config",
    ),
    "tensors missing": (
        lambda f: edit_config(f, num_hidden_layers=3),
        "model.layers.2.input_layernorm.weight is missing; .* (and 6 more)",
    ),
    "wrong shape": (
        lambda f: edit_config(f, vocab_size=400),
        "model.embed_tokens.weight is [320, 64], config.json asks for [400, 64]",
    ),
    "no weights": (lambda f: remove(f, "*.safetensors"), "model.safetensors is missing; download"),
    "pickled": (pickled, "it holds pickled .bin weights; save it as safetensors first"),
    "corrupt weights": (
        lambda f: rewrite(f, "model.safetensors", "not safetensors at all"),
        "model.safetensors cannot be read as safetensors",
    ),
    **{
        f"broken index {text[:9]}": (
            lambda f, text=text: rewrite(f, INDEX, text),
            INDEX,
        )
        for text in ("{oh", "[]", "{}", '{"weight_map": {"a": [1]}}', '{"weight_map": {"a": 1}}')
    },
}


def refused(source: str | Path, out: Path, message: str, **options: Any) -> None:
    """Conversion raises `message` and leaves neither `out` nor a temporary folder."""
    before = set(out.parent.iterdir())
    pattern = re.escape(message.format(source=source)).replace(r"\.\*", ".*")
    with pytest.raises(TurboSparseError, match=pattern):
        convert(str(source), out, **options)
    assert set(out.parent.iterdir()) == before


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_and_leaves_nothing(dense: Make, tmp_path: Path, mistake: str) -> None:
    make, message = MISTAKES[mistake]
    source = make(copytree(dense("mistral"), tmp_path / "source"))
    refused(source, tmp_path / "out", message)


def test_a_missing_shard_is_named(sharded: Make, tmp_path: Path) -> None:
    source = remove(copytree(sharded("mistral"), tmp_path / "source"), "model-00001*")
    refused(source, tmp_path / "out", "model-00001-of-.* is missing; download it again")


def test_a_sparse_model_is_not_converted_again(sparse: Make, tmp_path: Path) -> None:
    message = "is already sparse (ffn_activation 'drelu'); convert the dense model it came from"
    refused(sparse("mistral"), tmp_path / "out", message)


def test_mlp_biases_are_refused(dense: Make, tmp_path: Path) -> None:
    source = edit_config(copytree(dense("llama"), tmp_path / "source"), mlp_bias=True)
    refused(source, tmp_path / "out", "mlp_bias=true is not supported")


def test_an_unknown_activation_lists_the_known_ones(dense: Make, tmp_path: Path) -> None:
    message = "activation 'gelu' is unknown; use drelu, geglu, reglu, relu, relu2, swiglu"
    refused(dense("mistral"), tmp_path / "out", message, activation="gelu")


@pytest.mark.parametrize("make", [Path.touch, lambda path: copytree(Path(__file__).parent, path)])
def test_what_exists_is_not_overwritten(
    dense: Make, tmp_path: Path, make: Callable[[Path], object]
) -> None:
    make(tmp_path / "out")
    message = "{out} exists already; remove it or choose another name"
    refused(dense("mistral"), tmp_path / "out", message.replace("{out}", str(tmp_path / "out")))


def test_an_unlinkable_disk_says_to_copy(
    dense: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_disk(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("turbosparse.convert.os.link", other_disk)
    message = "cannot hard-link .* both must be on one disk; leave out --link to copy"
    refused(dense("mistral"), tmp_path / "out", message, link=True)


def test_a_full_disk_leaves_nothing(
    dense: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_source: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("turbosparse.convert.shutil.copyfile", full)
    refused(
        dense("mistral"),
        tmp_path / "out",
        "disk full while writing {out} (".replace("{out}", str(tmp_path / "out")),
    )
