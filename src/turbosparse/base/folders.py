"""Folders that hold models: read with clear errors, written whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbosparse.base.errors import TurboSparseError

# What the verbs take where they name a file or folder; on the command line it is a path.
if TYPE_CHECKING:
    AnyPath = str | Path
else:
    AnyPath = Path

# What travels with a model besides config and weights.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "chat_template.jinja",
)
_POINTER = b"version https://git-lfs"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def local_path(path: AnyPath) -> Path:
    """What a caller gave, with ``~`` as the home folder."""
    return Path(path).expanduser()


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """Read ``config.json`` (or a file like it) of a model folder as plain JSON."""
    path = folder / name
    if folder.is_file():
        raise TurboSparseError(f"{folder} is a file; give the folder of a model")
    if not folder.is_dir():
        raise TurboSparseError(f"no such folder: {folder}")
    if not path.is_file():
        raise TurboSparseError(f"{folder} has no {name}; give the folder of a model")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # bad syntax, bad UTF-8, too deep
        raise TurboSparseError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise TurboSparseError(f"{path} holds a {type(config).__name__}, not a JSON object")
    return config


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_companions(source: Path, out: Path) -> None:
    """Carry tokenizer, generation config and chat template over; without tokenizer it raises."""
    for name in companions(source):
        shutil.copyfile(source / name, out / name)


def companions(folder: Path) -> list[str]:
    """The companion files that a model folder has.

    Raises:
        TurboSparseError: none of them is a tokenizer, or one is not really there.
    """
    found = [name for name in COMPANIONS if (folder / name).is_file()]
    if not set(TOKENIZER_FILES) & set(found):
        raise TurboSparseError(
            f"{folder} has no tokenizer ({', '.join(TOKENIZER_FILES)}); "
            "copy the tokenizer files of the original model into it"
        )
    for name in found:
        refuse_pointer(folder / name)
        _refuse_outside(folder, folder / name)
    return found


def refuse_pointer(path: Path) -> None:
    """Raise if a file is what git leaves in place of one in its large file storage."""
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise TurboSparseError(
                f"{path} is a pointer of Git LFS, not the file itself; run `git lfs pull` there, "
                "or download the file"
            )


def _refuse_outside(folder: Path, path: Path) -> None:
    """Raise if a link leads out of the folder; those of the hub's cache lead to its own blobs."""
    real, home = path.resolve(), folder.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not (real.is_relative_to(home) or real.is_relative_to(blobs)):
        raise TurboSparseError(
            f"{path} is a link to {real}, outside the model; put the file itself there"
        )


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `out` on success and vanishes on any error.

    It is on the disk before it gets its name. What killed processes left of `out` is removed.

    Raises:
        TurboSparseError: `out` exists and is not an empty folder, or the disk is full.
    """
    check_free(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    for left in out.parent.glob(f".{glob.escape(out.name)}.*.*"):
        if _is_left(left, out):
            shutil.rmtree(left, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.{os.getpid()}.", dir=out.parent))
    lock = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with named_disk_errors(out):
            work.chmod(0o755)
            yield work
            for path in (*work.rglob("*"), work):
                _sync(path)
            if out.exists():
                out.rmdir()
            work.rename(out)
            _sync(out.parent)
    finally:
        os.close(lock)
        shutil.rmtree(work, ignore_errors=True)


def _is_left(folder: Path, out: Path) -> bool:
    """Whether a temporary folder of `out` belongs to no process that runs, here or elsewhere."""
    pid = folder.name.removeprefix(f".{out.name}.").split(".")[0]
    if not (pid.isdecimal() and folder.is_dir()):
        return False
    if int(pid) != os.getpid() and Path(f"/proc/{pid}").exists():
        return False
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # a process of another machine or container has it
        return False
    finally:
        os.close(lock)
    return True


def _sync(path: Path) -> None:
    """Have the disk write a file, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def named_disk_errors(out: Path) -> Iterator[None]:
    """Turn a full disk into a `TurboSparseError` that names what was being written."""
    try:
        yield
    except Exception as error:
        if not _is_full(error):
            raise
        free = shutil.disk_usage(out.parent).free
        raise TurboSparseError(
            f"disk full while writing {out} ({free / 1e9:.2f} GB free in {out.parent}); "
            "free some space or choose another place"
        ) from error


def _is_full(error: Exception) -> bool:
    full = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError):
        return error.errno in full
    # safetensors has only text for what the system said; the number in it is Rust's form
    return any(f"(os error {number})" in str(error) for number in full)


def check_free(out: Path) -> None:
    """Refuse to write over something that exists; an empty folder is fine."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        raise TurboSparseError(f"{out} exists already; remove it or choose another name")


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name that replaces `path` on success and vanishes on any error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield work
        _sync(work)
        work.replace(path)
        _sync(path.parent)
    finally:
        work.unlink(missing_ok=True)
