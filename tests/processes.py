"""Training on several processes: scripts that are started, and what their runs leave behind."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import drelu_recipe
from safetensors.torch import load_file

from turbosparse.hf.load import load_model

LENGTH, BATCH, STEPS = 32, 12, 6
Write = Callable[..., Path]

# accelerate shards on accelerators only: let it take a CPU for one, and see that weights are shards
ON_CPU = """
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from torch.distributed.fsdp import CPUOffloadPolicy
import turbosparse.train as stage
CPUOffloadPolicy.__init__.__defaults__ = (False,)  # nothing to pin memory for
make = stage.training_arguments
def arguments(*given):
    made = make(*given)
    assert made.device.type == "cpu"  # starts the process group
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
    return made
stage.training_arguments = arguments
def is_part(weight):
    return isinstance(weight, DTensor) and weight.to_local().numel() < weight.numel()
"""
IN_PASSES = """
import os, signal
from turbosparse.training.trainer import SparseTrainer
step, count = SparseTrainer.training_step, 0
def training_step(self, *given):
    global count
    count += 1
    for name, weight in self.model.named_parameters():
        assert is_part(weight), name
    here = (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"], str(count))
    if here == ("1", "0", os.environ.get("KILL_IN_PASS")):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *given)
SparseTrainer.training_step = training_step
"""
NO_ROOM = """
def full(*_, **__): raise OSError(28, "No space left on device")
import turbosparse.hf.load
turbosparse.hf.load.save_model = full
"""
OFFLOADED = """
prepare = SparseTrainer._prepare_for_training
def offloaded(self, *given):
    assert isinstance(self.accelerator.state.fsdp_plugin.cpu_offload, CPUOffloadPolicy)
    return prepare(self, *given)
SparseTrainer._prepare_for_training = offloaded
"""
NO_STEP = "SparseTrainer.training_step = None\n"
SHARDED = ON_CPU + IN_PASSES
TRAIN = """
from pathlib import Path
from turbosparse.train import train
train(Path({recipe!r}), out=Path({out!r}))
"""


def recipe_writer(folder: Path, dense: Callable[[str], Path], corpus: Path) -> Write:
    """write(family, **changes): the path of a recipe that trains it as a dReLU model."""

    def write(family: str = "mistral", **changes: Any) -> Path:
        given = {
            "tokens": STEPS * BATCH * LENGTH,
            "batch_size": BATCH,
            "micro_batch_size": 2,
            "checkpoint_every": 2,
        }
        fields = drelu_recipe(dense(family), corpus, LENGTH, **given | changes)
        path = folder / f"recipe-{len(list(folder.glob('recipe-*')))}.yaml"
        path.write_text(yaml.safe_dump(fields))
        return path

    return write


def clean_environment(**more: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    return {**clean, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **more}


def start(script: Path, *flags: object, **environment: str) -> subprocess.Popen[str]:
    """Under torchrun."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *map(str, flags), str(script)],
        env=clean_environment(**environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@cache
def _forking(environment: tuple[tuple[str, str], ...]) -> subprocess.Popen[str]:
    """The program of forking.py; it ends with this process."""
    program = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("forking.py"))],
        env=clean_environment(**dict(environment)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(program.communicate)
    return program


def run(
    script: Path,
    processes: int,
    *,
    fails: bool = False,
    nodes: int = 1,
    imports: tuple[tuple[str, str], ...] = (),
    **environment: str,
) -> str:
    """Run a script in processes that torchrun would start on each node; returns their output.

    `imports` is environment, too: what the libraries look at when they are imported.
    """
    world = {"WORLD_SIZE": str(processes * nodes), "LOCAL_WORLD_SIZE": str(processes)}
    world |= {"TORCHELASTIC_RESTART_COUNT": "0", **environment}
    ranks = [
        world | {"RANK": f"{node * processes + n}", "LOCAL_RANK": f"{n}", "GROUP_RANK": f"{node}"}
        for node in range(nodes)
        for n in range(processes)
    ]
    log = script.with_suffix(".log")
    log.unlink(missing_ok=True)
    program = _forking(imports)
    program.stdin.write(json.dumps({"script": str(script), "ranks": ranks, "log": str(log)}) + "\n")
    program.stdin.flush()
    failed, output = program.stdout.readline() != "0\n", log.read_text()
    assert failed == fails, output[-3000:]
    return output


def write_script(path: Path, recipe: Path, out: Path, prefix: str = SHARDED) -> Path:
    path.write_text(prefix + TRAIN.format(recipe=str(recipe), out=str(out)))
    return path


def log_of(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "training_log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in log_of(folder)]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(one: Path, other: Path, tolerance: float = 0) -> None:
    """To `tolerance`, relative RMS."""
    weights, others = weights_of(one), weights_of(other)
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        error = (weight - others[name]).norm() / weight.norm()
        assert error <= tolerance, name


def assert_same_run(one: Path, two: Path) -> None:
    """Log, weights and files, for runs on one process and on two."""
    assert losses(two) == pytest.approx(losses(one), rel=2e-4)
    for key in ("activation_sparsity", "grad_norm"):
        rows, rows_of_one = ([row[key] for row in log_of(folder)] for folder in (two, one))
        assert rows == pytest.approx(rows_of_one, rel=1e-2), key
    assert_same_weights(one, two, tolerance=1e-3)
    for name in ("config.json", "modeling_drelu.py", "ffn_activation.py"):
        assert (two / name).read_text() == (one / name).read_text()
    files = [sorted(file.name for file in folder.iterdir()) for folder in (one, two)]
    assert files[0] == files[1]
    load_model(two)
