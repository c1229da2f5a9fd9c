"""Documents of text, JSON-lines and ``.gz`` files, read one by one."""

from __future__ import annotations

import codecs
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
_LINE_SUFFIXES = (".jsonl", ".ndjson")
SUFFIXES = (*TEXT_SUFFIXES, *_LINE_SUFFIXES)
# Of one file that is named: no text, though they may be decoded as such.
_TABLES = (".csv", ".tsv", ".parquet", ".arrow", ".zst", ".zip", ".bz2", ".xz", ".tar")
_CHUNK = 1 << 20

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
            ``.jsonl`` or ``.ndjson`` (a row is one document), each also as ``.gz``; or a ``.json``
            file of such lines or of one list.
        template: how a row becomes text, for example ``"{question}\\n{answer}"``.
        separator: text between two documents of a text file.

    Raises:
        TurboSparseError: nothing there, not text, broken JSON, or a row without the template's
            fields.
    """
    rows = file_rows(corpus_files(path), separator, refuse)
    return some(read_rows(rows, lambda row: text_of(row, template), refuse), str(path))


def document_streams(
    path: Path, most: int, *, template: str = "{text}", separator: str | None = None
) -> list[Iterator[str]]:
    """The documents of `documents` as at most `most` streams, each of some of the files."""
    files = corpus_files(path)
    parts = [files[number::most] for number in range(min(most, len(files)))]
    return [
        read_rows(file_rows(part, separator, refuse), lambda row: text_of(row, template), refuse)
        for part in parts
    ]


def corpus_files(path: Path) -> list[Path]:
    """The readable files at or below `path`."""
    path = path.expanduser()
    if path.is_file():
        if _suffix(path) in _TABLES:
            raise MissingSource(
                f"{path} is neither text nor JSON lines; convert it to .jsonl, or give its folder "
                "as `dataset` in a recipe"
            )
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
    return (path.with_suffix("") if _is_gzip(path) else path).suffix.lower()


def _is_gzip(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def some(items: Iterable[Any], what: str) -> Iterator[Any]:
    item = None
    for item in items:
        yield item
    if item is None:
        raise TurboSparseError(f"{what} holds no text: every document in it is empty or unreadable")


def read_rows(
    rows: Iterable[tuple[str, Row]], make: Callable[[Row], Any], fault: Fault
) -> Iterator[Any]:
    """Documents of rows; empty ones are left out. A fault is reported with its place."""
    for where, row in rows:
        try:
            document = make(row)
            _check_text(document)
        except ValueError as error:
            fault(f"{where} {error}", error)
            continue
        except Exception as error:  # whatever a row can cause that nobody thought of
            fault(f"{where} cannot be read ({type(error).__name__}: {error})", error)
            continue
        if not isinstance(document, str) or document.strip():
            yield document


def _check_text(document: Document) -> None:
    texts = [document] if isinstance(document, str) else [m["content"] for m in document]
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"holds half a surrogate pair ({text[error.start]!a}), which is not text"
            ) from error


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
    """The rows of JSON files and the texts of the others, each with its place."""
    for file in files:
        where = name = str(file)
        read = _text_rows if _suffix(file) not in (*_LINE_SUFFIXES, ".json") else _json_rows
        try:
            with gzip.open(file) if _is_gzip(file) else file.open("rb") as raw:
                for where, row in read(raw, name, separator, fault):
                    yield where, row
        except (OSError, EOFError, zlib.error) as error:
            end = where.replace(f"{name}:", f"{name} after line ")
            what = "is a broken gzip file" if _is_gzip(file) else "cannot be read"
            fault(f"{end} {what} ({error}); fetch it again", error)


def _text_rows(
    raw: Any, where: str, separator: str | None, fault: Fault
) -> Iterator[tuple[str, Row]]:
    """The documents of a text file; no more of it is held than the document that is being read."""
    held: list[str] = []
    try:
        for piece in _decoded(raw):
            held.append(piece)
            if separator and separator in (text := "".join(held[-2:])):
                # a separator may lie across two pieces
                held[-2:] = [text]
                *whole, rest = "".join(held).split(separator)
                held = [rest]
                yield from ((where, part.strip()) for part in whole)
    except UnicodeDecodeError as error:
        at = raw.tell() - len(error.object) + error.start
        fault(_not_utf8(where, error, at), error)
        return
    text = "".join(held)
    held.clear()
    yield where, text.strip() if separator else text


def _decoded(raw: Any) -> Iterator[str]:
    """A UTF-8 file in pieces, with ``\\n`` as line ends and without a byte-order mark."""
    utf8 = codecs.getincrementaldecoder("utf-8-sig")()
    decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
    while chunk := raw.read(_CHUNK):
        yield decoder.decode(chunk)
    yield decoder.decode(b"", final=True)


def _json_rows(raw: Any, where: str, _: str | None, fault: Fault) -> Iterator[tuple[str, Row]]:
    """The rows of JSON lines, or of a ``.json`` file that holds one list."""
    may_be_list = where.lower().endswith((".json", ".json.gz"))
    for number, line in enumerate(raw, 1):
        if may_be_list and number == 1 and line.removeprefix(codecs.BOM_UTF8).startswith(b"["):
            if (rows := _json(line + raw.read(), where, fault)) is not None:
                for number, row in enumerate(rows, 1):
                    yield from _fields(row, f"{where}:{number}", fault)
            return
        if line.strip() and (row := _json(line, f"{where}:{number}", fault)) is not None:
            yield from _fields(row, f"{where}:{number}", fault)


def _fields(row: Any, where: str, fault: Fault) -> Iterator[tuple[str, Row]]:
    if isinstance(row, dict):
        yield where, row
    else:
        fault(f"{where} is not a row of fields, but a {type(row).__name__}", None)


def _not_utf8(where: str, error: UnicodeDecodeError, at: int) -> str:
    return (
        f"{where} is not UTF-8 text (byte {error.object[error.start]:#04x} at {at}); "
        "remove it from the corpus or convert it"
    )


def _json(line: bytes, where: str, fault: Fault) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        fault(_not_utf8(where, error, error.start), error)
    except (ValueError, RecursionError) as error:  # bad syntax, a number of 5,000 digits, too deep
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
