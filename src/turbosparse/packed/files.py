"""The weight files of a packed folder: safetensors whose tensors begin on pages, mapped to read."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import weakref
from collections.abc import Iterable, Iterator
from math import prod
from mmap import ACCESS_READ, MADV_DONTNEED, mmap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from turbosparse.base.folders import new_file
from turbosparse.packed.header import Fault, File, FormatError

PAGE = 4096
SHARD_BYTES = 4 << 30
HEADER_BYTES = 64 << 20  # far beyond any model's: damage must not ask for memory without end
_FILE_NAME = re.compile(r"model-\d{5,9}-of-\d{5,9}\.safetensors", re.ASCII)
_DTYPES: dict[str, np.dtype[Any]] = {
    "U8": np.dtype("u1"),
    "F32": np.dtype("<f4"),
    "I32": np.dtype("<i4"),
}


class Spec(NamedTuple):
    """Type and shape of one tensor in a packed folder, and its role.

    Roles are those of the tables of `families`, and ``pairs``, ``bundles``, ``neuron_order`` and
    ``predictor``.
    """

    dtype: str
    shape: tuple[int, ...]
    role: str
    quant: str = ""  # of a matrix
    cols: int = 0  # of a matrix: the weights of a row

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * _DTYPES[self.dtype].itemsize


class _Entry(NamedTuple):
    """One tensor in the header of a weight file; `start` and `end` count from its first byte."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def write_weights(
    folder: Path, plan: dict[str, Spec], tensors: Iterator[tuple[str, NDArray[Any]]]
) -> dict[str, File]:
    """Stream `tensors`, in the order of `plan`, into weight files; one is held at a time."""
    shards = _split(plan)
    files: dict[str, File] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        digest = hashlib.sha256()
        with new_file(folder / name) as work:
            with work.open("wb") as file:
                for chunk in _shard_bytes(shard, tensors):
                    digest.update(chunk)
                    file.write(chunk)
            files[name] = File(bytes=work.stat().st_size, sha256=digest.hexdigest())
    return files


def _split(plan: dict[str, Spec]) -> list[dict[str, Spec]]:
    shards: list[dict[str, Spec]] = [{}]
    size = 0
    for name, spec in plan.items():
        if shards[-1] and size + spec.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = spec
        size += spec.nbytes
    return shards


def _shard_bytes(
    shard: dict[str, Spec], tensors: Iterator[tuple[str, NDArray[Any]]]
) -> Iterator[bytes | memoryview]:
    header: dict[str, Any] = {"__metadata__": {"format": "turbosparse"}}
    offset = 0
    for number, (name, spec) in enumerate(shard.items()):
        for entry, dtype, shape, size in (
            (name, spec.dtype, spec.shape, spec.nbytes),
            (f"pad.{number}", "U8", (-spec.nbytes % PAGE,), -spec.nbytes % PAGE),
        ):
            if size:
                span = [offset, offset + size]
                header[entry] = {"dtype": dtype, "shape": list(shape), "data_offsets": span}
                offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % PAGE)
    yield len(text).to_bytes(8, "little")
    yield text
    for name, spec in shard.items():
        found, array = next(tensors)
        assert (found, array.shape) == (name, spec.shape), (
            f"{found} {array.shape} came for {name} {spec}"
        )
        array = np.ascontiguousarray(array, dtype=_DTYPES[spec.dtype])
        yield array.data.cast("B")
        yield bytes(-spec.nbytes % PAGE)


class WeightFile:
    """A weight file, mapped to read: `data` are its bytes.

    It stays open, so a file that replaces it under its name changes nothing. One that is written
    into does: to read behind a new end kills the process.

    Raises:
        FormatError: it is missing, or not of the size that the header says.
    """

    def __init__(self, folder: Path, name: str, file: File):
        self.folder, self.name = folder, name
        if not _FILE_NAME.fullmatch(name):
            detail = f"files: {name!r:.80} is not a weight file's name"
            raise FormatError(folder, Fault.HEADER, detail)
        if not (folder / name).is_file():
            raise FormatError(folder, Fault.FILE_MISSING, name)
        self.descriptor = os.open(folder / name, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)
        self._opened = self._state()
        if (size := self._opened[0]) != file.bytes or size < PAGE:
            raise FormatError(folder, Fault.FILE_SIZE, f"{name}: {size} bytes, not {file.bytes}")
        self._map = mmap(self.descriptor, 0, access=ACCESS_READ)
        self.data = np.frombuffer(self._map, np.uint8)

    def _state(self) -> tuple[int, int]:
        about = os.fstat(self.descriptor)
        return about.st_size, about.st_mtime_ns

    def check_unchanged(self) -> None:
        """Raise FormatError if another program wrote into the file, or cut it."""
        if self._state() != self._opened:
            raise FormatError(self.folder, Fault.FILE_CHANGED, self.name)

    def forget(self) -> None:
        """Give back what the page cache holds of the file, which counts for a memory limit."""
        if hasattr(os, "posix_fadvise"):
            self._map.madvise(MADV_DONTNEED)  # what is mapped would stay
            os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def open_direct(self) -> int:
        """Let reads of the descriptor go past the page cache; returns what they must be aligned to.

        1 where the file system or the system cannot.
        """
        flag = getattr(os, "O_DIRECT", 0)
        for alignment in (512, PAGE) if flag else ():
            try:
                flags = fcntl.fcntl(self.descriptor, fcntl.F_GETFL)
                fcntl.fcntl(self.descriptor, fcntl.F_SETFL, flags | flag)
                os.preadv(self.descriptor, [memoryview(mmap(-1, PAGE))[:alignment]], alignment)
            except OSError:
                fcntl.fcntl(self.descriptor, fcntl.F_SETFL, flags)
                continue
            return alignment
        return 1

    def load(self, offset: int, size: int) -> NDArray[np.uint8]:
        """Bytes of the file, read into memory.

        Raises:
            FormatError: the file ends early.
        """
        memory, done = mmap(-1, -(-size // PAGE) * PAGE), 0
        while done < size:
            part = memoryview(memory)[done : done + (1 << 30)]
            got = os.preadv(self.descriptor, [part], offset + done)
            if got == 0 or (got % PAGE and done + got < size):
                raise FormatError(self.folder, Fault.FILE_CHANGED, self.name)
            done += got
        return np.frombuffer(memory, np.uint8)[:size]


def named_tensors(
    folder: Path, files: list[WeightFile], plan: dict[str, Spec]
) -> dict[str, NDArray[Any]]:
    """The tensors of `plan` by name, read-only views of the mapped files.

    Raises:
        FormatError: a tensor is missing, damaged, or not what `plan` asks for.
    """
    tensors: dict[str, NDArray[Any]] = {}
    for file in files:
        data = file.data
        for entry in _entries(folder, file.name, data):
            if _is_pad(entry):
                continue
            _check(folder, entry, plan)
            if entry.name in tensors:
                raise FormatError(folder, Fault.TENSOR_TWICE, entry.name)
            view = data[entry.start : entry.end].view(_DTYPES[entry.dtype])
            tensors[entry.name] = view.reshape(plan[entry.name].shape)
    missing = [name for name in plan if name not in tensors]
    if missing:
        raise FormatError(folder, Fault.TENSOR_MISSING, missing[0])
    return tensors


def _is_pad(entry: _Entry) -> bool:
    return entry.name.startswith("pad.") and entry.end - entry.start < PAGE


def _check(folder: Path, entry: _Entry, plan: dict[str, Spec]) -> None:
    spec = plan.get(entry.name)
    if spec is None:
        raise FormatError(folder, Fault.TENSOR_UNKNOWN, entry.name)
    if (entry.dtype, entry.shape) != spec[:2] or entry.end - entry.start != spec.nbytes:
        found, asked = ([dtype, *shape] for dtype, shape in (entry[1:3], spec[:2]))
        raise FormatError(folder, Fault.TENSOR_SHAPE, f"{entry.name}: {found}, not {asked}")
    if entry.start % PAGE:
        raise FormatError(folder, Fault.ALIGNMENT, f"{entry.name} at byte {entry.start}")


def _entries(folder: Path, name: str, data: NDArray[np.uint8]) -> list[_Entry]:
    """The tensors of a weight file; together they cover its data once, without a hole."""
    length = int.from_bytes(data[:8].tobytes(), "little")
    if length > min(len(data) - 8, HEADER_BYTES):
        raise FormatError(folder, Fault.FILE_HEADER, f"{name}: header of {length} bytes")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise FormatError(folder, Fault.TENSOR_TWICE, f"{name}: {twice!r:.80}")
        return table

    try:
        table = json.loads(data[8 : 8 + length].tobytes(), object_pairs_hook=unique)
        table.pop("__metadata__", None)
        entries = [_entry(tensor, fields, 8 + length) for tensor, fields in table.items()]
    except FormatError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(folder, Fault.FILE_HEADER, f"{name}: {error!r:.80}") from error
    _check_cover(folder, name, entries, 8 + length, len(data))
    return entries


def _entry(tensor: str, fields: dict[str, Any], begin: int) -> _Entry:
    first, last = fields["data_offsets"]
    if not (type(first) is type(last) is int and 0 <= first <= last):
        raise ValueError(f"{tensor} spans {first}…{last}")
    return _Entry(tensor, fields["dtype"], tuple(fields["shape"]), begin + first, begin + last)


def _check_cover(folder: Path, name: str, entries: Iterable[_Entry], at: int, end: int) -> None:
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.end)):
        if entry.start != at:
            kind = "overlaps what precedes it" if entry.start < at else "follows a hole"
            raise FormatError(folder, Fault.FILE_LAYOUT, f"{name}: {entry.name:.80} {kind}")
        at = entry.end
    if at != end:
        raise FormatError(folder, Fault.FILE_LAYOUT, f"{name}: tensors end at byte {at} of {end}")


def verify_checksums(folder: Path, files: dict[str, File]) -> None:
    """Read every byte and compare it with what was written.

    Raises:
        FormatError: a byte differs.
    """
    for name, file in files.items():
        with (folder / name).open("rb") as data:
            if hashlib.file_digest(data, "sha256").hexdigest() != file.sha256:
                raise FormatError(folder, Fault.CHECKSUM, name)
