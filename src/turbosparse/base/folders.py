"""Folders that hold models: read with clear errors, written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from turbosparse.base.errors import TurboSparseError

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
# How the system and the libraries that write for us say it.
_DISK_FULL = ("No space left on device", "PytorchStreamWriter failed writing", "unexpected pos")
_POINTER = b"version https://git-lfs"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """Read ``config.json`` (or a file like it) of a model folder as plain JSON."""
    path = folder / name
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
def new_folder(out: str | Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `out` on success and vanishes on any error.

    Raises:
        TurboSparseError: `out` exists and is not an empty folder, or the disk is full.
    """
    out = Path(out).expanduser()
    check_free(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        with named_disk_errors(out):
            work.chmod(0o755)
            yield work
            if out.exists():
                out.rmdir()
            work.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def named_disk_errors(out: Path) -> Iterator[None]:
    """Turn a full disk, in whatever exception a library wraps it, into a `TurboSparseError`."""
    try:
        yield
    except BaseException as error:  # torch's CheckpointException is no Exception
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full and not any(words in str(error) for words in _DISK_FULL):
            raise
        free = shutil.disk_usage(out.parent).free
        raise TurboSparseError(
            f"disk full while writing {out} ({free / 1e9:.2f} GB free in {out.parent}); "
            "free some space or choose another place"
        ) from error


def check_free(out: str | Path) -> None:
    """Refuse to write over something that exists; an empty folder is fine."""
    out = Path(out).expanduser()
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
        work.replace(path)
    finally:
        work.unlink(missing_ok=True)
