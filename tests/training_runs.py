"""Training runs of a toy model: the recipe, and what a run leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import drelu_recipe
from safetensors.torch import load_file

LENGTH, BATCH, STEPS = 32, 4, 6

Dense = Callable[[str], Path]
Write = Callable[..., Path]


def write_recipe(path: Path, dense: Dense, corpus: Path, **changes: Any) -> Path:
    """A recipe that trains the dense Mistral as a dReLU model."""
    given = {
        "tokens": STEPS * BATCH * LENGTH,
        "batch_size": BATCH,
        "micro_batch_size": 2,
        "log_every": 2,
        "checkpoint_every": 2,
    }
    fields = drelu_recipe(dense("mistral"), corpus, LENGTH, **given | changes)
    path.write_text(yaml.safe_dump({k: v for k, v in fields.items() if v is not None}))
    return path


def stop_at(monkeypatch: pytest.MonkeyPatch, forward_pass: int, error: BaseException) -> None:
    """Raise `error` in the forward pass of this number, counted from 1."""
    from turbosparse.training.trainer import SparseTrainer

    step = SparseTrainer.training_step
    count = 0

    def training_step(self: Any, *args: Any) -> Any:
        nonlocal count
        count += 1
        if count == forward_pass:
            raise error
        return step(self, *args)

    monkeypatch.setattr(SparseTrainer, "training_step", training_step)


def log_of(folder: Path, name: str = "training_log.jsonl") -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_run(one: Path, other: Path) -> None:
    assert log_of(one) == log_of(other)
    weights, others = weights_of(one), weights_of(other)
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, others[name]), name


def python(code: str, *, home: Path, cwd: Path, launcher: tuple[str, ...] = ()) -> int:
    """Run `code` in a fresh Python whose home and caches are `home`; return its exit status."""
    script = home.with_suffix(".py")
    script.write_text(code)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_"))}
    environment = {**clean, "HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    home.mkdir()
    command = [sys.executable, *launcher, str(script)]
    run = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True)
    if run.returncode > 0:
        pytest.fail(run.stderr[-3000:])
    return run.returncode
