"""Training on several processes and nodes, sharded; what stops a run, and how it goes on."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Shared
from processes import (
    BATCH,
    LENGTH,
    NO_ROOM,
    NO_STEP,
    OFFLOADED,
    SHARDED,
    Write,
    assert_same_run,
    assert_same_weights,
    log_of,
    losses,
    recipe_writer,
    run,
    start,
    weights_of,
    write_script,
)
from safetensors.torch import load_file, save
from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception

from turbosparse.base.errors import TurboSparseError
from turbosparse.hf.load import load_model
from turbosparse.train import train
from turbosparse.training.arguments import with_adapters
from turbosparse.training.checkpoints import load_weights
from turbosparse.training.recipe import Lora


@pytest.fixture
def recipe(tmp_path: Path, dense: Callable[[str], Path], corpus: Path) -> Write:
    return recipe_writer(tmp_path, dense, corpus)


# --- sharded --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_sharded_run_writes_the_folder_of_a_run_on_one_process(
    recipe: Write, tmp_path: Path, family: str
) -> None:
    """Also where the states wait in host memory, as those of the mixture do."""
    offload = family == "mixtral"
    settings = {"tokens": 3 * BATCH * LENGTH, "gradient_checkpointing": offload}
    train(recipe(family, **settings), out=tmp_path / "one")
    path = recipe(family, **settings, shard="full", offload=offload)
    prefix = SHARDED + OFFLOADED * offload
    run(write_script(tmp_path / "run.py", path, tmp_path / "two", prefix), 2)
    assert_same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_a_sharded_run_whose_model_could_not_be_written_only_writes_it_again(
    recipe: Write, tmp_path: Path
) -> None:
    path, out = recipe(shard="full", precision="bf16", tokens=2 * BATCH * LENGTH), tmp_path / "out"
    error = run(write_script(tmp_path / "a.py", path, out, SHARDED + NO_ROOM), 2, fails=True)
    assert "disk full while writing" in error
    run(write_script(tmp_path / "b.py", path, out, SHARDED + NO_STEP), 2)
    train(recipe(precision="bf16", tokens=2 * BATCH * LENGTH), out=tmp_path / "one")
    assert losses(out) == pytest.approx(losses(tmp_path / "one"), rel=2e-3)
    assert {weight.dtype for weight in weights_of(out).values()} == {torch.float32}
    assert_same_weights(out, tmp_path / "one", tolerance=0.05)


@pytest.mark.slow
def test_a_killed_sharded_run_goes_on_at_the_same_and_at_another_process_count(
    recipe: Write, tmp_path: Path
) -> None:
    path, whole = recipe("mixtral", shard="full"), tmp_path / "whole"
    run(write_script(tmp_path / "whole.py", path, whole), 2)
    work = tmp_path / "out.training"
    script = write_script(tmp_path / "run.py", path, tmp_path / "out")
    killed = {"KILL_IN_PASS": "14"}  # 3 passes are a step: in the fifth
    run(script, 2, fails=True, **killed)
    assert {folder.name for folder in work.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    run(script, 3)
    assert losses(tmp_path / "out") == pytest.approx(losses(whole), rel=2e-4)
    assert losses(tmp_path / "out")[:4] == losses(whole)[:4]
    assert_same_weights(tmp_path / "out", whole, tolerance=1e-3)

    script = write_script(tmp_path / "again.py", path, tmp_path / "again")
    flags = ("--standalone", "--nproc_per_node", 2, "--max_restarts", 1)
    # without it they may hang where they meet, in the store of those that were killed
    apart = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    job = start(script, *flags, **killed, **apart)
    error = job.communicate(timeout=300)[1]
    assert job.returncode == 0, error[-3000:]
    assert "exitcode: -9" in error, "it was killed, and torchrun started it again"
    assert losses(tmp_path / "again") == losses(whole)
    assert_same_weights(tmp_path / "again", whole)


@pytest.mark.slow
def test_two_nodes_train_as_one_process_does(recipe: Write, tmp_path: Path) -> None:
    settings = {"tokens": 3 * BATCH * LENGTH}
    train(recipe(**settings), out=tmp_path / "one")
    path = recipe(**settings, shard="full")
    script = write_script(tmp_path / "run.py", path, tmp_path / "two")
    run(script, 1, nodes=2)
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_sharding_that_would_not_happen_is_refused(recipe: Write, tmp_path: Path) -> None:
    with pytest.raises(TurboSparseError, match="offload belongs to shard: full"):
        train(recipe(offload=True), out=tmp_path / "out")
    path = recipe(shard="full")
    with pytest.raises(TurboSparseError, match="shard: full spreads the model over several"):
        train(path, out=tmp_path / "out")
    script = write_script(tmp_path / "run.py", path, tmp_path / "out", prefix="")
    error = run(script, 2, fails=True)
    assert "shard: full was asked for, but on this machine" in error
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "out.training").glob("*"))


@pytest.mark.parametrize("of", ["DEEPSPEED", "FSDP"])
def test_other_ways_to_shard_are_refused(
    recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of: str
) -> None:
    """On a CPU the library leaves them out in silence; elsewhere it would export a part."""
    monkeypatch.setenv(f"ACCELERATE_USE_{of}", "true")
    with pytest.raises(TurboSparseError, match=f"ACCELERATE_USE_{of} is set.*shard: full"):
        train(recipe(), out=tmp_path / "out")


def test_gradient_checkpointing_changes_no_number(recipe: Write, tmp_path: Path) -> None:
    for name, checkpointing in (("with", True), ("without", False)):
        path = recipe("mixtral", gradient_checkpointing=checkpointing, tokens=2 * BATCH * LENGTH)
        train(path, out=tmp_path / name)
    one, other = log_of(tmp_path / "with"), log_of(tmp_path / "without")
    for row, row_without in zip(one, other, strict=True):
        assert row == pytest.approx(row_without, rel=1e-6)


# --- mixtures of experts --------------------------------------------------------------------------


def test_the_log_tells_what_routers_and_experts_did(
    recipe: Write, tmp_path: Path, dense: Callable[[str], Path], batches: list[torch.Tensor]
) -> None:
    train(recipe("mixtral", tokens=BATCH * LENGTH), out=tmp_path / "out")
    (logged,) = log_of(tmp_path / "out")

    model = load_model(dense("mixtral"), activation="drelu")
    with torch.no_grad():
        found = [model(ids, output_router_logits=True).router_logits for ids in batches]
    for layer in (0, 1):
        shares = torch.cat([logits[layer] for logits in found]).double().softmax(-1)
        entropy = -(shares * shares.log()).sum(-1).mean()
        assert logged[f"router_entropy/layer_0{layer}"] == pytest.approx(float(entropy), rel=1e-4)
        chosen = shares.topk(2).indices.flatten().bincount(minlength=4)
        load = (chosen.double() / chosen.sum()).tolist()
        loads = [logged[f"expert_load/layer_0{layer}/expert_{expert}"] for expert in range(4)]
        assert loads == pytest.approx(load, abs=1e-9)
        assert logged[f"expert_load_max/layer_0{layer}"] == max(loads)
        of_experts = [logged[f"sparsity/layer_0{layer}/expert_{expert}"] for expert in range(4)]
        pooled = sum(s * share for s, share in zip(of_experts, load, strict=True))
        assert logged[f"sparsity/layer_0{layer}"] == pytest.approx(pooled, abs=1e-9)
    means = [logged[f"router_entropy/layer_0{layer}"] for layer in (0, 1)]
    assert logged["router_entropy"] == pytest.approx(sum(means) / 2)


def test_the_auxiliary_loss_reaches_the_router_and_evens_the_load(
    recipe: Write, tmp_path: Path
) -> None:
    for name, weight in (("without", 0.0), ("with", 1.0)):
        train(recipe("mixtral", router_aux_loss_coef=weight), out=tmp_path / name)
    first, first_with = log_of(tmp_path / "without")[0], log_of(tmp_path / "with")[0]
    # in a load that is even the loss is the number of experts that a token goes to
    assert 1.9 < first_with["loss"] - first["loss"] < 4
    heaviest = [log_of(tmp_path / name)[-1]["expert_load_max"] for name in ("without", "with")]
    assert heaviest[1] < heaviest[0] - 0.02
    config = json.loads((tmp_path / "with" / "config.json").read_text())
    assert config["router_aux_loss_coef"] == 1.0
    assert not config["output_router_logits"]


def test_the_auxiliary_loss_weighs_the_same_however_a_batch_is_split(
    recipe: Write, tmp_path: Path
) -> None:
    for micro in (3, 12):
        path = recipe("mixtral", micro_batch_size=micro, router_aux_loss_coef=1.0)
        train(path, out=tmp_path / str(micro))
    assert losses(tmp_path / "3") == pytest.approx(losses(tmp_path / "12"), rel=0.02)


# --- faults ---------------------------------------------------------------------------------------


def spoil_pass(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Make the loss of this forward pass, counted from 1, no number."""
    from transformers import Trainer

    count, compute = 0, Trainer.compute_loss

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        loss, outputs = compute(self, *args, **kwargs)
        return loss * (float("nan") if count == number else 1), outputs

    monkeypatch.setattr(Trainer, "compute_loss", compute_loss)


@pytest.mark.parametrize("every", [1, 2])
def test_a_loss_that_is_no_number_stops_the_run_before_it_is_learnt(
    recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    out = tmp_path / "out"
    path = recipe(checkpoint_every=every)
    with monkeypatch.context() as patch:
        spoil_pass(patch, 20)  # six passes are a step: in the fourth
        with pytest.raises(TurboSparseError, match=r"^step 4: .*not finite.*lower learning_rate"):
            train(path, out=out)
    work = tmp_path / "out.training"
    newest = max(work.glob("checkpoint-*"), key=lambda folder: folder.name)
    assert newest.name == f"checkpoint-{4 - every}"
    assert all(w.isfinite().all() for w in weights_of(newest).values())

    fields = yaml.safe_load(path.read_text()) | {"learning_rate": 1e-3}
    path.write_text(yaml.safe_dump(fields))
    train(path, out=out)
    rates = [row["learning_rate"] for row in log_of(out)]
    assert rates[3 - every] > 1e-3 * 0.9
    whole = recipe(learning_rate=1e-3)
    train(whole, out=tmp_path / "whole")
    lowered = [row["learning_rate"] for row in log_of(tmp_path / "whole")]
    assert rates[4:] == pytest.approx(lowered[4:])
    assert json.loads((out / "recipe.json").read_text())["learning_rate"] == 1e-3


def test_a_process_whose_loss_is_no_number_stops_the_others(recipe: Write, tmp_path: Path) -> None:
    spoil = """
import os
from transformers import Trainer
compute, count = Trainer.compute_loss, 0
def compute_loss(*given, **named):
    global count
    count += 1
    bad = os.environ["RANK"] == "1" and count == 7
    loss, outputs = compute(*given, **named)
    return loss * (float("nan") if bad else 1), outputs
Trainer.compute_loss = compute_loss
"""
    path = recipe(checkpoint_every=1)
    error = run(write_script(tmp_path / "run.py", path, tmp_path / "out", spoil), 2, fails=True)
    assert "TurboSparseError: step 3: the loss or its gradient is not finite" in error
    work = tmp_path / "out.training"
    assert {folder.name for folder in work.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}


@pytest.fixture(scope="session")
def whole(shared: Shared, dense: Callable[[str], Path], corpus: Path) -> Path:
    """The model of a run of `recipe()` that nothing stopped."""

    def make(folder: Path) -> None:
        folder.mkdir()
        train(recipe_writer(folder, dense, corpus)(), out=folder / "model")

    return shared("whole", make) / "model"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
        CheckpointException("write", {1: _wrap_exception(RuntimeError("unexpected pos 7 vs 5"))}),
    ],
    ids=["system", "torch", "distributed"],
)
def test_a_full_disk_at_a_checkpoint_leaves_the_one_before(
    recipe: Write,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
) -> None:
    path, out = recipe(), tmp_path / "out"
    save = torch.save

    def full(thing: Any, target: Any, *args: Any, **kwargs: Any) -> None:
        if "checkpoint-4/optimizer" in str(target):
            Path(target).write_bytes(b"half")
            raise error
        save(thing, target, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(
            TurboSparseError, match=r"checkpoint-4 cannot be written .* GB were free"
        ):
            train(path, out=out)
    work = tmp_path / "out.training"
    assert [folder.name for folder in work.glob("checkpoint-*")] == ["checkpoint-2"]
    train(path, out=out)
    assert losses(out) == losses(whole)
    assert_same_weights(out, whole)


@pytest.fixture(scope="session")
def stopped_once(shared: Shared, dense: Callable[[str], Path], corpus: Path) -> Path:
    def make(folder: Path) -> None:
        folder.mkdir()
        path = recipe_writer(folder, dense, corpus)()
        with pytest.MonkeyPatch.context() as patch:
            spoil_pass(patch, 25)
            with pytest.raises(TurboSparseError, match="step 5"):
                train(path, out=folder / "out")
        path.rename(folder / "recipe.yaml")

    return shared("stopped", make)


@pytest.fixture
def stopped(stopped_once: Path, tmp_path: Path) -> Path:
    """A run that stopped in step 5, with checkpoints of the steps 2 and 4: recipe.yaml and out."""
    return shutil.copytree(stopped_once, tmp_path / "stopped")


@pytest.mark.parametrize("damage", ["one byte", "cut", "gone"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    stopped: Path, whole: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    file = stopped / "out.training" / "checkpoint-4" / "optimizer.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content[: -100 if damage == "cut" else None])
    if damage == "gone":
        file.unlink()
    capsys.readouterr()
    train(stopped / "recipe.yaml", out=stopped / "out")
    said = capsys.readouterr().err
    assert "checkpoint-4 is damaged (optimizer.pt): the one before it is taken" in said
    assert losses(stopped / "out") == losses(whole)
    assert_same_weights(stopped / "out", whole)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(stopped: Path) -> None:
    for file in (stopped / "out.training").glob("checkpoint-*/model.safetensors"):
        file.write_bytes(b"")
    with pytest.raises(TurboSparseError, match="has no complete checkpoint; remove it"):
        train(stopped / "recipe.yaml", out=stopped / "out")


def test_processes_that_do_not_see_the_same_files_are_told(
    recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("turbosparse.training.checkpoints._checksum", lambda _: None)
    with pytest.raises(TurboSparseError, match="give an --out that all nodes share"):
        train(recipe(), out=tmp_path / "out")


# --- low-rank additions ---------------------------------------------------------------------------


def test_adapters_keep_drelu_and_merge_into_an_ordinary_folder(
    recipe: Write,
    dense: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("peft")
    base = load_model(dense("mistral"), activation="drelu")
    ids = torch.arange(20)[None]
    expected = base(ids).logits
    targets = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = with_adapters(base, Lora(targets=targets), seed=0, rows=None)
    assert torch.equal(adapted(ids).logits, expected), "at the start an adapter adds zero"

    adapted.save_pretrained(tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / "adapter_model.safetensors"
    file.write_bytes(save({**dict(list(load_file(file).items())[1:])}))
    with pytest.raises(TurboSparseError, match="does not hold the adapters of this run: base_m"):
        load_weights(adapted, tmp_path / "checkpoint")

    lora = {"rank": 4, "alpha": 8, "targets": targets}
    out = tmp_path / "out"
    path = recipe(lora=lora)
    with monkeypatch.context() as patch:
        spoil_pass(patch, 25)
        with pytest.raises(TurboSparseError, match="step 5"):
            train(path, out=out)
    trained = train(path, out=out)
    assert trained.last_loss < trained.first_loss
    train(path, out=tmp_path / "whole")
    assert losses(out) == losses(tmp_path / "whole")
    assert_same_weights(out, tmp_path / "whole")
    before, after = weights_of(dense("mistral")), weights_of(out)
    assert before.keys() == after.keys()
    changed = {name.split(".")[-2] for name in after if not torch.equal(before[name], after[name])}
    assert changed == set(targets)
    model = load_model(out)
    assert model.config.ffn_activation == "drelu"
    assert "PeftModel" not in json.dumps(json.loads((out / "config.json").read_text()))


def test_adapters_for_matrices_that_are_not_there_are_refused(
    recipe: Write, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    targets = {"targets": ["q_proj", "gate_proj"]}  # a mixture's experts are fused
    with pytest.raises(TurboSparseError, match="lora: the model has no module gate_proj"):
        train(recipe("mixtral", lora=targets), out=tmp_path / "out")
