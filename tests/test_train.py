"""Training by a recipe: what it writes and logs, and that a stopped run ends like any other."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONTEXT, VOCABULARY
from training_runs import (
    BATCH,
    LENGTH,
    STEPS,
    Dense,
    Write,
    log_of,
    python,
    weights_of,
)

from turbosparse.base.errors import TurboSparseError
from turbosparse.hf.load import load_model, load_tokenizer
from turbosparse.train import train
from turbosparse.training.arguments import training_arguments
from turbosparse.training.recipe import Recipe, read_recipe

FROM_SCRATCH = {
    "model_type": "mistral",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize("family", ["mistral", "mixtral"])
def test_a_dense_model_goes_on_as_a_sparse_one_and_learns(
    recipe: Write, dense: Dense, tmp_path: Path, family: str
) -> None:
    out = tmp_path / "out"
    trained = train(recipe(model=str(dense(family))), out=out)
    log = log_of(out)
    assert [row["step"] for row in log] == [2, 4, 6]
    assert log[-1]["loss"] < log[0]["loss"] - 0.3
    assert (trained.first_loss, trained.last_loss) == (log[0]["loss"], log[-1]["loss"])
    assert (trained.steps, trained.tokens) == (STEPS, STEPS * BATCH * LENGTH)
    assert trained.activation == "drelu"

    model = load_model(out)
    assert model.config.model_type == f"drelu_{family}"
    assert model.config.use_cache
    assert {weight.dtype for weight in weights_of(out).values()} == {torch.float32}
    assert load_tokenizer(out)("boats") == load_tokenizer(dense(family))("boats")
    assert Recipe.model_validate(json.loads((out / "recipe.json").read_text())).tokens == 768


def test_a_trained_model_runs_without_this_package(whole: Path, tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules["turbosparse"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(whole)!r}, trust_remote_code=True)
torch.save(model(torch.arange(20)[None]).logits.detach(), {str(tmp_path / "logits")!r})
"""
    python(code, home=tmp_path / "home", cwd=tmp_path)
    with torch.no_grad():
        expected = load_model(whole)(torch.arange(20)[None]).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits"), expected, rtol=1e-5, atol=1e-5)


def test_the_dense_control_is_a_stock_model_that_saw_the_same_batches(
    recipe: Write,
    tmp_path: Path,
    batches: list[torch.Tensor],
    whole_batches: list[torch.Tensor],
) -> None:
    train(recipe(), out=tmp_path / "control", activation="swiglu")
    assert torch.equal(torch.cat(batches), torch.cat(whole_batches))
    config = json.loads((tmp_path / "control" / "config.json").read_text())
    assert (config["model_type"], config["hidden_act"]) == ("mistral", "silu")
    assert "auto_map" not in config
    assert not list((tmp_path / "control").glob("*.py"))


@pytest.mark.parametrize("activation", [None, "drelu"])
def test_a_model_is_trained_from_scratch(
    recipe: Write, dense: Dense, tmp_path: Path, activation: str | None
) -> None:
    path = recipe(model=FROM_SCRATCH, tokenizer=str(dense("mistral")), activation=activation)
    trained = train(path, out=tmp_path / "out")
    assert trained.activation == (activation or "swiglu")
    assert trained.first_loss == pytest.approx(math.log(VOCABULARY), abs=0.3)
    assert trained.last_loss < trained.first_loss
    other = train(path, out=tmp_path / "other", seed=1)
    assert other.first_loss != trained.first_loss


@pytest.mark.parametrize("activation", ["drelu", "reglu", "swiglu"])
def test_the_log_holds_the_exact_zeros_of_the_forward_passes(
    recipe: Write,
    dense: Dense,
    tmp_path: Path,
    batches: list[torch.Tensor],
    activation: str,
) -> None:
    changes = {"activation": activation}
    train(recipe(tokens=BATCH * LENGTH, **changes), out=tmp_path / "out")
    (logged,) = log_of(tmp_path / "out")

    model = load_model(dense("mistral"), activation=activation)
    zeros: list[list[float]] = [[], []]
    for layer, block in enumerate(model.model.layers):
        block.mlp.down_proj.register_forward_pre_hook(
            lambda _module, inputs, layer=layer: zeros[layer].append(
                float((inputs[0] == 0).double().mean())
            )
        )
    with torch.no_grad():
        for ids in batches:
            model(ids)
    by_layer = [sum(shares) / len(shares) for shares in zeros]
    found = [logged["sparsity/layer_00"], logged["sparsity/layer_01"]]
    assert found == pytest.approx(by_layer, abs=1e-12)
    assert logged["activation_sparsity"] == pytest.approx(sum(by_layer) / 2, abs=1e-12)
    low, high = {"drelu": (0.6, 0.9), "reglu": (0.3, 0.7), "swiglu": (0, 0)}[activation]
    assert low <= logged["activation_sparsity"] <= high


def test_the_learning_rate_warms_up_and_falls_to_its_minimum(recipe: Write, tmp_path: Path) -> None:
    top, least, warmup = 2e-3, 5e-4, 2
    path = recipe(min_learning_rate=least, warmup_steps=warmup, log_every=1)
    train(path, out=tmp_path / "out")

    def rate(done: int) -> float:
        if done < warmup:
            return top * done / warmup
        cosine = (1 + math.cos(math.pi * (done - warmup) / (STEPS - warmup))) / 2
        return least + (top - least) * cosine

    log = log_of(tmp_path / "out")
    assert [row["step"] for row in log] == list(range(1, STEPS + 1))
    assert [row["learning_rate"] for row in log] == pytest.approx([rate(s) for s in range(STEPS)])


def test_the_last_step_is_logged_whatever_the_interval(recipe: Write, tmp_path: Path) -> None:
    """With the mean loss of the steps since the line before."""
    for name, interval in (("each", 1), ("some", 4)):
        train(recipe(log_every=interval, checkpoint_every=100), out=tmp_path / name)
    each, some = log_of(tmp_path / "each"), log_of(tmp_path / "some")
    assert [row["step"] for row in some] == [4, 6]
    losses = [row["loss"] for row in each]
    expected = [sum(losses[:4]) / 4, sum(losses[4:]) / 2]
    assert [row["loss"] for row in some] == pytest.approx(expected, rel=1e-6)
    for key in ("learning_rate", "grad_norm", "activation_sparsity"):
        assert some[-1][key] == pytest.approx(each[-1][key], rel=1e-9)


def test_the_split_into_micro_batches_changes_nothing(
    recipe: Write, whole: Path, tmp_path: Path
) -> None:
    train(recipe(micro_batch_size=None), out=tmp_path / "one pass")
    losses = [[row["loss"] for row in log_of(run)] for run in (whole, tmp_path / "one pass")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_settings_reach_the_optimiser(recipe: Write, tmp_path: Path) -> None:
    changes = {"weight_decay": 0.03, "betas": [0.8, 0.9], "clip_norm": 0.5, "seed": 7}
    arguments = training_arguments(read_recipe(recipe(**changes)), tmp_path)
    expected = {
        "weight_decay": 0.03,
        "adam_beta1": 0.8,
        "adam_beta2": 0.9,
        "max_grad_norm": 0.5,
        "seed": 7,
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "ddp_timeout": 24 * 3600,  # while the first process reads the stream again
    }
    assert {key: getattr(arguments, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("precision", "machine", "bf16"),
    [
        ("fp32", {"amx_bf16": True}, False),
        ("bf16", {}, True),
        ("auto", {"amx_bf16": True}, True),
        ("auto", {"avx512_bf16": True}, True),
        ("auto", {"avx2": True}, False),
    ],
)
def test_auto_precision_takes_bf16_where_the_machine_is_made_for_it(
    recipe: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    machine: dict[str, bool],
    bf16: bool,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: machine)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert training_arguments(read_recipe(recipe(precision=precision)), tmp_path).bf16 is bf16


def test_bf16_training_computes_otherwise_and_still_writes_float32(
    recipe: Write, whole: Path, tmp_path: Path
) -> None:
    train(recipe(precision="bf16"), out=tmp_path / "bf16")
    full, half = (log_of(folder)[-1]["loss"] for folder in (whole, tmp_path / "bf16"))
    assert half != full
    assert half == pytest.approx(full, rel=0.02)
    assert {weight.dtype for weight in weights_of(tmp_path / "bf16").values()} == {torch.float32}


def test_two_processes_train_the_same_model_and_leave_nothing_else_behind(
    recipe: Write, tmp_path: Path
) -> None:
    """Not in the home folder, not in the working folder, not beside the model."""
    path, cwd = recipe(log_every=1), tmp_path / "cwd"
    cwd.mkdir()
    train(path, out=tmp_path / "one")
    code = f"""
from pathlib import Path
from turbosparse.train import train
train(Path({str(path)!r}), out=Path({str(tmp_path / "two")!r}))
"""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    before = set(tmp_path.iterdir())
    assert python(code, home=tmp_path / "home", cwd=cwd, launcher=torchrun) == 0
    new = {child.name for child in set(tmp_path.iterdir()) - before}
    assert new == {"two", "home", "home.py"}
    assert not list((tmp_path / "home").rglob("*"))
    assert not list(cwd.rglob("*"))
    files = [sorted(f.name for f in (tmp_path / run).iterdir()) for run in ("one", "two")]
    assert files[0] == files[1]
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    for key in ("loss", "learning_rate", "grad_norm"):
        assert [row[key] for row in two] == pytest.approx([row[key] for row in one], rel=1e-3), key
    sparsity = [[row["activation_sparsity"] for row in log] for log in (one, two)]
    assert sparsity[1] == pytest.approx(sparsity[0], abs=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lerning_rate": 1}, r"recipe\.yaml: lerning_rate: Extra inputs"),
        ({"learning_rate": -1}, "learning_rate: Input should be greater than 0"),
        ({"tokens": None}, "tokens: Field required"),
        ({"activation": "gelu"}, "activation: Input should be 'drelu'"),
        (
            {
                "data": {
                    "sources": [{"name": "a", "path": "a", "proportion": 0.5}],
                    "sequence_length": 8,
                }
            },
            r"data: .*proportions add up to 0\.5",
        ),
        ({"batch_size": 3}, r"batch_size 3 is not a multiple of micro_batch_size 2 × 1 processes"),
        ({"model": "/nowhere"}, "no such folder: /nowhere"),
        ({"betas": [2, 5]}, "betas.0: Input should be less than 1"),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0"),
        ({"seed": 2**32}, "seed: Input should be less than 4294967296"),
        ({"learning_rate": float("inf")}, "learning_rate: Input should be a finite number"),
        ({"min_learning_rate": 1.0}, "min_learning_rate 1 is above learning_rate 0.002"),
        ({"lora": {"targets": [""]}}, "lora.targets.0: String should have at least 1"),
        ({"report_to": ["nobody"]}, "report_to: nobody is not known; known are .*wandb"),
        ({"report_to": ["wandb"]}, "report_to: wandb is not installed"),
        ({"tokens": 1}, "tokens 1 are less than one step of .* = 128; raise tokens or lower"),
        ({"batch_size": 10**9}, "tokens 768 are less than one step of .* = 32000000000;"),
        ({"model": FROM_SCRATCH}, "trains from scratch: name a tokenizer"),
    ],
)
def test_a_mistake_in_a_recipe_is_named(
    recipe: Write, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(TurboSparseError, match=message):
        train(recipe(**changes), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.training").exists(), "it would block the corrected recipe"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such recipe: "),
        ("model: [", "is not valid YAML"),
        ("model: caf\udce9", "is not valid YAML: 'utf-8' codec can't decode byte 0xe9"),
        ("[" * 10_000, "is not valid YAML"),
        ("only text", "it holds no keys"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(
    tmp_path: Path, content: str | None, message: str
) -> None:
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_bytes(os.fsencode(content))
    with pytest.raises(TurboSparseError, match=message):
        train(path, out=tmp_path / "out")


def test_sequences_longer_than_the_context_are_refused(
    recipe: Write, tmp_path: Path, corpus: Path
) -> None:
    source = {"name": "a", "path": str(corpus), "proportion": 1}
    path = recipe(tokens=800, data={"sources": [source], "sequence_length": 200})
    with pytest.raises(
        TurboSparseError, match=f"sequence_length 200 is longer than the model's context {CONTEXT}"
    ):
        train(path, out=tmp_path / "out")


def test_a_tokenizer_of_another_model_is_refused(
    recipe: Write, dense: Dense, tmp_path: Path
) -> None:
    small = {**FROM_SCRATCH, "vocab_size": 300}
    path = recipe(model=small, tokenizer=str(dense("mistral")))
    with pytest.raises(
        TurboSparseError, match=f"the tokenizer has {VOCABULARY} tokens, the model only 300"
    ):
        train(path, out=tmp_path / "out")


def test_a_model_gets_rows_for_tokens_that_were_added_to_its_tokenizer(
    recipe: Write, dense: Dense, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    shutil.copytree(dense("mistral"), own)
    tokenizer = load_tokenizer(own)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(own)
    (tmp_path / "x.txt").write_text("a boat [PAD] and a gull " * 200)
    source = {"name": "x", "path": str(tmp_path / "x.txt"), "proportion": 1}
    path = recipe(model=str(own), data={"sources": [source], "sequence_length": LENGTH})
    train(path, out=tmp_path / "out")
    assert load_model(tmp_path / "out").config.vocab_size == VOCABULARY + 1
    assert len(load_tokenizer(tmp_path / "out")) == VOCABULARY + 1


def test_an_existing_model_is_never_written_over(recipe: Write, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    with pytest.raises(TurboSparseError, match="out exists already"):
        train(recipe(), out=out)
    assert (out / "config.json").read_text() == "{}"
    assert not (tmp_path / "out.training").exists()
    shutil.rmtree(out)
    out.mkdir()  # an empty folder is no model
    train(recipe(), out=out)
    assert (out / "config.json").is_file()
