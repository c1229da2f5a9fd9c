"""Training that is stopped, killed or cannot write, and goes on as if nothing had been."""

from __future__ import annotations

import errno
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_runs import (
    STEPS,
    Dense,
    Write,
    assert_same_run,
    log_of,
    python,
    stop_at,
)
from transformers import PreTrainedModel

from turbosparse.base.errors import TurboSparseError
from turbosparse.train import train


# two forward passes are a step, and a checkpoint is written every second step
@pytest.mark.parametrize(
    ("stopped_in", "resumes_after"),
    [(3, 0), (5, 2), (10, 4)],
    ids=["before the first checkpoint", "right after one", "within a step"],
)
def test_a_stopped_run_goes_on_and_ends_like_any_other(
    recipe: Write,
    batches: list[torch.Tensor],
    whole: Path,
    whole_batches: list[torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stopped_in: int,
    resumes_after: int,
) -> None:
    path, out = recipe(), tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_at(patch, stopped_in, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            train(path, out=out)
    assert not out.exists()
    assert (tmp_path / "out.training").is_dir()

    batches.clear()
    train(path, out=out)
    assert torch.equal(torch.cat(batches), torch.cat(whole_batches[2 * resumes_after :]))
    assert_same_run(out, whole)
    assert not (tmp_path / "out.training").exists()


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "llama"])
def test_a_checkpoint_holds_all_weights_whatever_their_names_and_files(
    recipe: Write,
    dense: Dense,
    whole_of: Dense,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    family: str,
    sharded: bool,
) -> None:
    """Experts stand in it one by one, a tied head not at all; the weights may fill many files."""
    path, out = recipe(model=str(dense(family))), tmp_path / "out"
    with monkeypatch.context() as patch:
        if sharded:
            save = PreTrainedModel.save_pretrained
            small = partialmethod(save, max_shard_size="50KB")
            patch.setattr(PreTrainedModel, "save_pretrained", small)
        stop_at(patch, 10, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            train(path, out=out)
    files = list((tmp_path / "out.training" / "checkpoint-4").glob("model*.safetensors"))
    assert (len(files) > 1) == sharded
    capfd.readouterr()
    train(path, out=out)
    said = capfd.readouterr().err
    assert "turbosparse: resuming from step 4\n" in said
    assert "issing" not in said
    assert_same_run(out, whole_of(family) / "model")


def test_a_checkpoint_that_lacks_a_tensor_or_has_another_ends_the_run(
    recipe: Write, dense: Dense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = recipe(model=str(dense("mixtral"))), tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_at(patch, 10, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            train(path, out=out)
    checkpoint = tmp_path / "out.training" / "checkpoint-4"
    (checkpoint / "seal.json").write_text("{}")
    file = checkpoint / "model.safetensors"
    weights = load_file(file)
    norm = weights.pop("model.norm.weight")
    more = {"model.norm.weight": norm, "x": norm.clone()}
    for message, added in (("model.norm.weight is missing", {}), ("x has no place", more)):
        save_file(weights | added, file, metadata={"format": "pt"})
        with pytest.raises(TurboSparseError, match=f"checkpoint-4: .*{message}"):
            train(path, out=out)
    assert not out.exists()


@pytest.mark.parametrize("damage", ["no trainer_state.json", "half a trainer_state.json"])
def test_a_half_written_checkpoint_is_passed_over(
    recipe: Write, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    path, out = recipe(), tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_at(patch, 10, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            train(path, out=out)
    state = tmp_path / "out.training" / "checkpoint-4" / "trainer_state.json"
    if damage == "no trainer_state.json":
        state.unlink()
    else:
        state.write_bytes(state.read_bytes()[:100])
    train(path, out=out)
    assert_same_run(out, whole)


@pytest.mark.parametrize("family", ["mistral", "mixtral"])
def test_a_run_whose_model_could_not_be_written_only_writes_it_again(
    recipe: Write,
    dense: Dense,
    whole_of: Dense,
    batches: list[torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
) -> None:
    path, out = recipe(model=str(dense(family))), tmp_path / "out"

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("turbosparse.hf.load.save_model", full)
        with pytest.raises(TurboSparseError, match=r"disk full while writing .*out"):
            train(path, out=out)
    assert not out.exists()
    batches.clear()
    trained = train(path, out=out)
    assert not batches, "training was complete"
    assert trained.steps == STEPS
    assert_same_run(out, whole_of(family) / "model")


def test_a_killed_process_goes_on_like_any_other(
    recipe: Write, whole: Path, tmp_path: Path
) -> None:
    path, out = recipe(), tmp_path / "out"
    code = f"""
import os, signal
from pathlib import Path
from turbosparse.train import train
from turbosparse.training.trainer import SparseTrainer
step, count = SparseTrainer.training_step, 0
def training_step(*args):
    global count
    count += 1
    if count == 10:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*args)
SparseTrainer.training_step = training_step
train(Path({str(path)!r}), out=Path({str(out)!r}))
"""
    assert python(code, home=tmp_path / "home", cwd=tmp_path) == -9
    assert not out.exists()
    with (tmp_path / "out.training" / "log.jsonl").open("a") as log:
        log.write('{"step": 5, "lo')  # the line that it was writing
    train(path, out=out)
    assert_same_run(out, whole)


def test_a_run_stopped_between_log_lines_logs_the_same_losses(
    recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interval of the log is none of the checkpoints' business."""
    path = recipe(log_every=3)
    train(path, out=tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, 10, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            train(path, out=tmp_path / "out")
    train(path, out=tmp_path / "out")
    losses = [[row["loss"] for row in log_of(tmp_path / run)] for run in ("out", "whole")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_stopped_run_is_not_resumed_with_other_settings(
    recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_at(patch, 1, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            train(recipe(), out=out)
    before = (tmp_path / "out.training" / "recipe.json").read_bytes()
    with pytest.raises(TurboSparseError, match=r"other settings \(seed, weight_decay\);"):
        train(recipe(weight_decay=0.2), out=out, seed=3)
    assert (tmp_path / "out.training" / "recipe.json").read_bytes() == before


def test_a_log_file_gets_a_line_now_and_then(
    recipe: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("turbosparse.base.progress.EVERY", 0)
    train(recipe(), out=tmp_path / "out")
    lines = [line for line in capfd.readouterr().err.splitlines() if "training: " in line]
    assert len(lines) == STEPS
    assert "turbosparse: training: 6 of 6  loss " in lines[-1]


@pytest.mark.parametrize("place", ["train.write_json", "training.trainer._Log.on_log"])
def test_a_full_disk_is_named_wherever_it_is_met(
    recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"turbosparse.{place}", full)
    with pytest.raises(TurboSparseError, match=r"disk full while writing .*out.training"):
        train(recipe(), out=tmp_path / "out")


def test_the_bar_is_taken_down_when_training_fails(
    recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import turbosparse.training.trainer

    bars = []

    class Bar(turbosparse.training.trainer.Progress):
        def start(self) -> None:
            bars.append(self)
            super().start()

    monkeypatch.setattr(turbosparse.training.trainer, "Progress", Bar)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # rich takes it for a terminal
    stop_at(monkeypatch, 2, RuntimeError("out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"):
        train(recipe(), out=tmp_path / "out")
    (bar,) = bars
    assert not bar.disable
    assert not bar.live.is_started, "the terminal would stay without a cursor"
