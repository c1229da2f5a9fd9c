"""Checkpoints of a training run: sealed once they are whole, checked before a run resumes."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from turbosparse.base.errors import TurboSparseError
from turbosparse.base.folders import new_file, write_json
from turbosparse.hf.load import read_weights

SEAL = "seal.json"  # {file: CRC-32}, written when all the others are on disk
_CHUNK = 1 << 24


def seal(folder: Path, accelerator: Any) -> None:
    """Mark a checkpoint as whole; every process calls it when it has written its part.

    Raises:
        TurboSparseError: the processes wrote to different disks.
    """
    from accelerate.utils import gather_object

    accelerator.wait_for_everyone()
    mine = [str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()]
    sums = _checksums(folder, sorted({*gather_object(mine)} - {SEAL}), accelerator)
    if hidden := [name for name, total in sums.items() if total is None]:
        raise TurboSparseError(
            f"not every process finds {folder / hidden[0]}; give an --out that all nodes share"
        )
    if accelerator.is_main_process:
        with new_file(folder / SEAL) as file:
            write_json(file, sums)
    accelerator.wait_for_everyone()


def newest_whole(work: Path, accelerator: Any, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole; what stands above it is put out of the way.

    Raises:
        TurboSparseError: there were finished checkpoints, and all of them are damaged.
    """
    folders = sorted(work.glob("checkpoint-*"), key=step_of, reverse=True)
    finished = False
    for folder in folders:
        fault = _fault(folder, accelerator)
        if fault is None:
            return folder
        finished |= (folder / SEAL).is_file()
        accelerator.wait_for_everyone()  # everyone has looked
        if accelerator.is_main_process:
            say(f"{folder} {fault}: the one before it is taken")
            if (folder / SEAL).is_file():
                folder.rename(folder.with_name(f"damaged-{folder.name}"))
            else:
                shutil.rmtree(folder)
        accelerator.wait_for_everyone()
    if finished:
        raise TurboSparseError(
            f"{work} has no complete checkpoint; remove it to start again, or put an older "
            "copy of a checkpoint there"
        )
    return None


def load_weights(model: Any, checkpoint: Path) -> None:
    """Put the weights of a checkpoint into a model that is whole on this process, all of them.

    A mixture's experts stand in a checkpoint one by one and in memory as one tensor. Of a model
    with adapters a checkpoint holds only these.

    Raises:
        TurboSparseError: the checkpoint holds other tensors than the model.
    """
    if not hasattr(model, "peft_config"):
        model.load_state_dict(read_weights(checkpoint, model.config).state_dict())
        return
    from peft import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    weights = load_peft_weights(str(checkpoint), device="cpu")
    if differing := sorted(get_peft_model_state_dict(model).keys() ^ weights.keys()):
        raise TurboSparseError(
            f"{checkpoint} does not hold the adapters of this run: {', '.join(differing[:3])}; "
            "remove the checkpoint to resume from the one before it"
        )
    set_peft_model_state_dict(model, weights)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def _fault(folder: Path, accelerator: Any) -> str | None:
    """What is wrong with a checkpoint, the same on all processes."""
    try:
        expected = json.loads((folder / SEAL).read_bytes())
    except FileNotFoundError:
        return "was not finished"
    except ValueError:
        return f"is damaged ({SEAL})"
    found = _checksums(folder, sorted(expected), accelerator)
    changed = sorted(name for name in expected if found.get(name) != expected[name])
    return f"is damaged ({', '.join(changed)})" if changed else None


def _checksums(folder: Path, files: list[str], accelerator: Any) -> dict[str, int | None]:
    """The checksum of each file; the processes share the reading."""
    from accelerate.utils import gather_object

    mine = files[accelerator.process_index :: accelerator.num_processes]
    return dict(gather_object([(name, _checksum(folder / name)) for name in mine]))


def _checksum(path: Path) -> int | None:
    """None if the file is not there."""
    total = 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                total = zlib.crc32(chunk, total)
    except FileNotFoundError:
        return None
    return total
