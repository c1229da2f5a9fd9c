"""DeepSpeed's ZeRO by a recipe, on CPUs that stand in for GPUs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import (
    BATCH,
    IN_PASSES,
    LENGTH,
    NO_ROOM,
    NO_STEP,
    Write,
    assert_same_run,
    assert_same_weights,
    losses,
    recipe_writer,
    run,
    weights_of,
    write_script,
)

from turbosparse.base.errors import TurboSparseError
from turbosparse.train import train

# accelerate knows DeepSpeed on accelerators only: let it take a CPU for one; STAGE is set before
DEEPSPEED = """
import deepspeed.comm.torch, torch, transformers.training_args
from accelerate import PartialState
from accelerate.utils import DistributedType
import turbosparse.training.arguments as stage
deepspeed.comm.torch.build_shm_op = lambda: None  # a minute's build of what only inference calls
stage.has_accelerator = transformers.training_args.is_torch_bf16_gpu_available = lambda: True
PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_XPU)
PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
def is_part(weight):
    return STAGE < 3 or weight.ds_tensor.numel() < weight.ds_numel
"""
APART = Path(sys.prefix) / "deepspeed"  # see the Makefile
ZERO = {"imports": (("DS_ACCELERATOR", "cpu"), ("PYTHONPATH", str(APART)))}


@pytest.fixture
def recipe(tmp_path: Path, dense: Callable[[str], Path], corpus: Path) -> Write:
    return recipe_writer(tmp_path, dense, corpus)


@pytest.fixture
def zero(recipe: Write, tmp_path: Path) -> Callable[..., Path]:
    """zero(name, stage, **changes): a script that trains with DeepSpeed, as it shards on GPUs."""
    if not APART.is_dir():
        pytest.skip("make setup installs deepspeed")

    def write(
        name: str, stage: int, more: str = "", family: str = "mistral", **changes: Any
    ) -> Path:
        # by default it leaves small weights whole
        of_stage = {"stage": stage, "stage3_param_persistence_threshold": 0}
        path = recipe(family, deepspeed={"zero_optimization": of_stage}, **changes)
        prefix = f"STAGE = {stage}\n" + DEEPSPEED + IN_PASSES + more
        return write_script(tmp_path / "run.py", path, tmp_path / name, prefix)

    return write


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "family"), [(2, "mistral"), (3, "mixtral")])
def test_deepspeed_writes_the_folder_of_a_run_on_one_process_and_goes_on_when_killed(
    zero: Callable[..., Path], recipe: Write, tmp_path: Path, stage: int, family: str
) -> None:
    settings = {"tokens": 3 * BATCH * LENGTH, "gradient_checkpointing": family == "mixtral"}
    settings["checkpoint_every"] = 1
    train(recipe(family, **settings), out=tmp_path / "one")
    run(zero("two", stage, family=family, **settings), 2, **ZERO)
    assert_same_run(tmp_path / "one", tmp_path / "two")

    script = zero("killed", stage, family=family, **settings)
    run(script, 2, fails=True, KILL_IN_PASS="8", **ZERO)  # 3 passes are a step: in the third
    found = {folder.name for folder in (tmp_path / "killed.training").glob("checkpoint-*")}
    assert found == {"checkpoint-1", "checkpoint-2"}
    run(script, 2, **ZERO)
    assert losses(tmp_path / "killed") == losses(tmp_path / "two")
    assert_same_weights(tmp_path / "killed", tmp_path / "two")


@pytest.mark.slow
def test_a_deepspeed_run_whose_model_could_not_be_written_only_writes_it_again(
    zero: Callable[..., Path], recipe: Write, tmp_path: Path
) -> None:
    settings = {"precision": "bf16", "tokens": 2 * BATCH * LENGTH}
    error = run(zero("out", 3, more=NO_ROOM, **settings), 2, fails=True, **ZERO)
    assert "disk full while writing" in error
    run(zero("out", 3, more=NO_STEP, **settings), 2, **ZERO)
    train(recipe(**settings), out=tmp_path / "one")
    # its weights themselves are bf16 in a pass
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "one"), rel=1e-2)
    assert {weight.dtype for weight in weights_of(tmp_path / "out").values()} == {torch.float32}
    assert_same_weights(tmp_path / "out", tmp_path / "one", tolerance=0.05)


def test_deepspeed_that_would_not_happen_is_refused(
    recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import turbosparse.training.arguments as stage

    settings = {"deepspeed": {"zero_optimization": {"stage": 2}}}
    monkeypatch.setattr(stage, "has_accelerator", lambda: False)
    with pytest.raises(TurboSparseError, match="deepspeed needs GPUs, and this machine has none"):
        train(recipe(**settings), out=tmp_path / "out")
    monkeypatch.setattr(stage, "has_accelerator", lambda: True)
    monkeypatch.setattr(stage, "find_spec", lambda _: None)
    with pytest.raises(TurboSparseError, match="pip install deepspeed"):
        train(recipe(**settings), out=tmp_path / "out")
    monkeypatch.setattr(stage, "find_spec", lambda _: True)
    with pytest.raises(TurboSparseError, match="deepspeed wants torchrun"):
        train(recipe(**settings), out=tmp_path / "out")
    monkeypatch.setenv("LOCAL_RANK", "0")
    for other, named in (({"shard": "full"}, "shard: full"), ({"lora": {}}, "lora")):
        with pytest.raises(TurboSparseError, match=f"deepspeed and {named} do not go together"):
            train(recipe(**settings, **other), out=tmp_path / "out")
    with pytest.raises(TurboSparseError, match="--plan does not know what DeepSpeed takes"):
        train(recipe(**settings), plan=True)
    assert not (tmp_path / "out").exists()
