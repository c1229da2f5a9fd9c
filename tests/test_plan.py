"""`train --plan`: memory, steps and FLOPs from a recipe and a config."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from turbosparse.base.errors import TurboSparseError
from turbosparse.hf.load import new_config
from turbosparse.packed.synthetic import SHAPES
from turbosparse.train import train
from turbosparse.training.plan import Plan, activation_bytes

MIXTRAL = {
    **SHAPES["mixtral-8x7b"],
    "max_position_embeddings": 32768,
    "architectures": ["MixtralForCausalLM"],
}
LENGTH = 4096


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    """recipe(**changes): a recipe for Mixtral, of whose folder only the config is there."""
    model = tmp_path / "mixtral"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(MIXTRAL))

    def write(**changes: Any) -> Path:
        fields: dict[str, Any] = {
            "model": str(model),
            "activation": "drelu",
            "data": {
                "sources": [{"name": "web", "path": "nowhere", "proportion": 1}],
                "sequence_length": LENGTH,
            },
            "tokens": 150_000_000_000,
            "batch_size": 2048,
            "micro_batch_size": 1,
            "learning_rate": 5e-5,
            "precision": "bf16",
            **changes,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(fields))
        return path

    return write


def plan(path: Path, **flags: Any) -> Plan:
    planned = train(path, plan=True, **flags)
    assert isinstance(planned, Plan)
    return planned


def test_mixtral_at_the_size_of_the_paper(recipe: Callable[..., Path]) -> None:
    planned = plan(recipe(shard="full", gradient_checkpointing=True), processes=64, tflops=140)
    assert planned.parameters == 46_702_792_704
    assert planned.active_parameters == pytest.approx(12.75e9, rel=0.01)
    assert (planned.steps, planned.tokens_per_step) == (17881, 2048 * LENGTH)
    assert planned.passes_per_step == 32
    assert planned.flops == pytest.approx(6 * planned.active_parameters * planned.tokens)
    assert planned.weights == -(-4 * planned.parameters // 64)
    assert planned.optimiser == 2 * planned.weights
    assert planned.seconds == pytest.approx(planned.flops * 8 / 6 / (140e12 * 64))
    assert planned.total < 80e9
    assert str(planned).count("GiB") >= 7
    assert "6 FLOPs per active parameter" in str(planned)


def test_only_sharding_spreads_the_states(recipe: Callable[..., Path]) -> None:
    one, eight = (plan(recipe(), processes=n) for n in (1, 8))
    assert (one.weights, one.optimiser) == (eight.weights, eight.optimiser)
    assert one.total == sum(
        (one.weights, one.gradients, one.optimiser, one.working_copies, one.activations_whole)
    )
    sharded = plan(recipe(shard="full"), processes=8)
    assert sharded.optimiser * 8 == pytest.approx(one.optimiser)
    assert sharded.activations_checkpointed < sharded.activations_whole / 4
    half = plan(recipe(precision="fp32"), processes=1)
    assert half.activations_whole > one.activations_whole


def test_adapters_have_small_states(recipe: Callable[..., Path]) -> None:
    planned = plan(recipe(lora={"rank": 16, "targets": ["q_proj", "v_proj"]}))
    assert planned.trained_parameters == 32 * 16 * (4096 + 4096 + 4096 + 1024)
    assert planned.optimiser == 8 * planned.trained_parameters


def test_the_plan_is_one_json_document(
    recipe: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from turbosparse import cli

    words = ["train", str(recipe()), "--plan", "--processes", "4", "--json"]
    monkeypatch.setattr("sys.argv", ["turbosparse", *words])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    assert json.loads(capsys.readouterr().out)["processes"] == 4


def test_flags_of_the_plan_and_of_a_run_do_not_mix(recipe: Callable[..., Path]) -> None:
    with pytest.raises(TurboSparseError, match="give --out"):
        train(recipe())
    with pytest.raises(TurboSparseError, match="belong to --plan"):
        train(recipe(), out=Path("never"), processes=2)


@pytest.mark.parametrize("activation", ["drelu", "swiglu"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_as_large_as_those_that_autograd_keeps(
    activation: str, checkpointing: bool
) -> None:
    from transformers import AutoModelForCausalLM

    fields: dict[str, Any] = {
        "model_type": "mistral",
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 448,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "attn_implementation": "sdpa",
    }
    config = new_config(fields, activation=activation)
    model = AutoModelForCausalLM.from_config(config)
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    ids = torch.zeros(2, 64, dtype=torch.int64)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        keep(model(ids, labels=ids, use_cache=False).logits)
    tokens, layers, hidden = ids.numel(), fields["num_hidden_layers"], fields["hidden_size"]
    whole, checkpointed = activation_bytes(config, tokens=tokens, compute=4, stream=4)
    # the second figure has one layer more: the one that is being computed again
    layer = (whole - checkpointed + 4 * tokens * layers * hidden) / (layers - 1)
    expected = checkpointed - layer if checkpointing else whole
    assert sum(kept.values()) == pytest.approx(expected, rel=0.1)


@pytest.mark.slow
def test_a_run_takes_what_the_plan_says(tmp_path: Path, dense: Callable[[str], Path]) -> None:
    """Above what a run of next to nothing takes, in a process of its own."""
    (tmp_path / "x.txt").write_text("The small boats went home. " * 2000)
    model = {"model_type": "llama", "vocab_size": 16384, "hidden_size": 256}
    model |= {"intermediate_size": 768, "num_hidden_layers": 4, "tie_word_embeddings": True}
    model |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    fields: dict[str, Any] = {
        "tokenizer": str(dense("llama")),
        "data": {
            "sources": [{"name": "x", "path": str(tmp_path / "x.txt"), "proportion": 1}],
            "sequence_length": 128,
        },
        "tokens": 3 * 16 * 128,
        "batch_size": 16,
        "learning_rate": 1e-4,
        "precision": "fp32",
        "report_to": [],
    }
    small = model | {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 32}
    for name, config in (("small", small), ("large", model)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(fields | {"model": config}))
    code = f"""
from pathlib import Path
from turbosparse.train import train
for name in ("small", "large"):
    train(Path({str(tmp_path)!r}) / (name + ".yaml"), out=Path({str(tmp_path)!r}) / name)
    status = Path("/proc/self/status").read_text()  # getrusage counts the parent's peak, too
    print(1024 * int(status.split("VmHWM:")[1].split()[0]))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, run.stdout.split())
    expected = plan(tmp_path / "large.yaml").total - plan(tmp_path / "small.yaml").total
    assert after - before == pytest.approx(expected, rel=0.2)
