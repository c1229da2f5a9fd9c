"""Folders that hold models: found and read with clear errors, written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
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
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


# What is fetched of a model on the hub.
_HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt")


def model_folder(source: str | Path, files: Sequence[str] = _HUB_FILES) -> Path:
    """The local folder of a model; the `files` of a hub id such as ``org/name`` are downloaded."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise TurboSparseError(f"{source} is a file; give the folder that holds config.json")
    if not _looks_like_hub_id(str(source)):
        raise TurboSparseError(
            f"no such folder: {source}; give a model folder or a hub id org/name"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=list(files)))
    except Exception as error:  # the hub client raises many unrelated types
        raise TurboSparseError(
            f"{source} is no local folder, and downloading it from the hub failed "
            f"({type(error).__name__}); check the name, the network and your access to the model"
        ) from error


def _looks_like_hub_id(source: str) -> bool:
    return source.count("/") == 1 and not source.startswith((".", "/", "~")) and " " not in source


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
    if not any((source / name).is_file() for name in TOKENIZER_FILES):
        raise TurboSparseError(
            f"{source} has no tokenizer ({', '.join(TOKENIZER_FILES)}); "
            "copy the tokenizer files of the original model into it"
        )
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


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
