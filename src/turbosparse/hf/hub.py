"""Where a model is: a folder, or a repository of the hub that is downloaded."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from turbosparse.base.errors import TurboSparseError
from turbosparse.base.folders import COMPANIONS, local_path
from turbosparse.hf.checkpoint import INDEX, shard_names


def model_folder(source: str | Path, *, weights: bool = True) -> Path:
    """The local folder of a model.

    Args:
        source: folder, or ``.gguf`` file (its model is written as a folder into the cache, once),
            or hub id such as ``org/name``, or ``org/name@revision`` with a branch, tag
            or commit.
        weights: whether they are downloaded too.
    """
    path = local_path(source)
    if path.suffix == ".gguf" and path.is_file():
        return _imported(path)
    folder = some_files(source, ["config.json", INDEX, *COMPANIONS])
    if path.is_dir() or not weights:
        return folder
    # the folder bears the name of the commit: both calls see the same one
    repository = str(source).partition("@")[0]
    return _download(repository, folder.name, shard_names(folder))


def some_files(source: str | Path, files: list[str], *, what: str = "a model folder") -> Path:
    """The local folder of a source; of a hub id these files are downloaded. Errors name `what`."""
    path = local_path(source)
    if path.is_dir():
        return path
    if path.exists():
        raise TurboSparseError(f"{source} is a file; give the folder that holds it")
    repository, _, revision = str(source).partition("@")
    if not is_hub_id(repository):
        raise TurboSparseError(f"no such folder: {source}; give {what} or a hub id org/name")
    return _download(repository, revision or None, files)


def _imported(path: Path) -> Path:
    """The folder of a GGUF file in the cache: made again when the file has changed."""
    from turbosparse.base.progress import note
    from turbosparse.hf.gguf import import_gguf

    about = path.stat()
    mark = hashlib.sha256(f"{path.resolve()} {about.st_size} {about.st_mtime_ns}".encode())
    root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "turbosparse"
    folder = root / "gguf" / f"{path.stem}-{mark.hexdigest()[:12]}"
    if not folder.exists():
        note(f"importing {path.name} into {folder}")
        import_gguf(path, folder)
    return folder


def is_hub_id(source: str) -> bool:
    """Whether a name has the form of one of the hub, ``org/name``."""
    return source.count("/") == 1 and not source.startswith((".", "/", "~")) and " " not in source


def _download(repository: str, revision: str | None, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=files))
    except Exception as error:  # the hub client raises many unrelated types
        at = f"@{revision}" if revision else ""
        raise TurboSparseError(
            f"{repository}{at} is not a local folder, and downloading it from the hub failed "
            f"({type(error).__name__}); check the name, the network and your access to the model"
        ) from error
