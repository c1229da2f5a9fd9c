"""Documents of text, JSON-lines and ``.gz`` files, read one by one."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from turbosparse.base.errors import TurboSparseError
from turbosparse.training import chatml

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")


SUFFIXES = (*TEXT_SUFFIXES, ".jsonl")


Document = str | chatml.Messages


Row = str | dict[str, Any]  # a text, or fields


Fault = Callable[[str, Exception | None], None]


class MissingSource(TurboSparseError):
    """A source that cannot be opened at all: it is not there, has another name, or is gated."""


def refuse(message: str, cause: Exception | None) -> None:
    """What becomes of an unreadable document unless the recipe says otherwise."""
    raise TurboSparseError(message) from cause


def documents(
    path: Path, *, template: str = "{text}", separator: str | None = None
) -> Iterator[str]:
    """Yield the documents of a file or of all files below a folder, in the order of their names.

    Args:
        path: ``.txt``, ``.md``, ``.py`` (a file is one document unless `separator` is given),
            ``.jsonl`` (a row is one document), each also as ``.gz``.
        template: how a row becomes text, for example ``"{question}\\n{answer}"``.
        separator: text between two documents of a text file.

    Raises:
        TurboSparseError: nothing there, not text, broken JSON, or a row without the template's
            fields.
    """
    rows = file_rows(corpus_files(path), separator, refuse)
    return some(read_rows(rows, lambda row: text_of(row, template), refuse), str(path))


def corpus_files(path: Path) -> list[Path]:
    """The readable files at or below `path`."""
    path = path.expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise MissingSource(f"no such file or folder: {path}")
    files = sorted(f for f in path.rglob("*") if f.is_file() and _suffix(f) in SUFFIXES)
    if not files:
        raise MissingSource(
            f"{path} holds no corpus file; known are {', '.join(SUFFIXES)}, also .gz"
        )
    return files


def _suffix(path: Path) -> str:
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix


def some(items: Iterable[Any], what: str) -> Iterator[Any]:
    item = None
    for item in items:
        yield item
    if item is None:
        raise TurboSparseError(f"{what} holds no text: every document in it is empty or unreadable")


def read_rows(
    rows: Iterable[tuple[str, Row]], make: Callable[[Row], Any], fault: Fault
) -> Iterator[Any]:
    """Documents of rows; empty ones are left out."""
    for where, row in rows:
        try:
            document = make(row)
        except ValueError as error:
            fault(f"{where} {error}", error)
            continue
        if not isinstance(document, str) or document.strip():
            yield document


def text_of(row: Row, template: str) -> str:
    if isinstance(row, str):
        return row
    try:
        present = {key: "" if value is None else value for key, value in row.items()}
        return template.format_map(present)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"does not fit the template {template!r}: the row has {', '.join(row)}"
        ) from error


def file_rows(files: list[Path], separator: str | None, fault: Fault) -> Iterator[tuple[str, Row]]:
    """The rows of ``.jsonl`` files and the texts of the others, each with its place."""
    for file in files:
        where = end = str(file)
        try:
            with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as raw:
                if _suffix(file) != ".jsonl":
                    text = io.StringIO(raw.read().decode(), newline=None).read()  # \r\n too
                    for part in text.split(separator) if separator else [text]:
                        yield where, part.strip() if separator else part
                    continue
                for number, line in enumerate(raw, 1):
                    where, end = f"{file}:{number}", f"{file} after line {number}"
                    if line.strip() and (row := _json_row(line, where, fault)) is not None:
                        yield where, row
        except UnicodeDecodeError as error:
            fault(_not_utf8(where, error), error)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            fault(f"{end} is a broken gzip file ({error}); fetch it again", error)


def _not_utf8(where: str, error: UnicodeDecodeError) -> str:
    return (
        f"{where} is not UTF-8 text (byte {error.object[error.start]:#04x} at {error.start}); "
        "remove it from the corpus or convert it"
    )


def _json_row(line: bytes, where: str, fault: Fault) -> Row | None:
    try:
        row = json.loads(line.decode())
        if isinstance(row, dict):
            return row
        fault(f"{where} is no row of fields, but a {type(row).__name__}", None)
    except UnicodeDecodeError as error:
        fault(_not_utf8(where, error), error)
    except (json.JSONDecodeError, RecursionError) as error:
        fault(f"{where} is not valid JSON: {error}", error)
    return None


def drop_last(items: Iterable[Any], count: int) -> Iterator[Any]:
    """All items but the last `count`."""
    waiting: deque[Any] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()


def take_last(items: Iterable[str], count: int | None) -> list[str]:
    """The last `count` items, or all."""
    return list(deque(items, maxlen=count))
