"""Text for training and measuring: documents from files or the hub, packed and mixed.

A corpus is a text, JSON-lines or ``.gz`` file, a folder of them, or a hub data set. Documents are
tokenised one by one, laid end to end and cut into sequences of one length; a mixture draws whole
sequences from its sources, so that proportions hold in tokens whatever the lengths of the
documents.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from turbosparse.folders import TurboSparseError

if TYPE_CHECKING:
    import datasets

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl")


class Source(BaseModel):
    """One source of a mixture: local files (`path`) or a hub data set (`dataset`)."""

    model_config = ConfigDict(extra="forbid")

    name: str
    proportion: float = Field(gt=0, le=1, description="share of the training tokens")
    path: Path | None = None
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    template: str = Field("{text}", description="how a JSON row becomes text")
    separator: str | None = Field(None, description="what separates documents inside a text file")
    skip_last: int = Field(0, ge=0, description="documents at the end kept out of training")

    @model_validator(mode="after")
    def _one_origin(self) -> Source:
        if (self.path is None) == (self.dataset is None):
            raise ValueError(f"source {self.name!r} needs exactly one of path and dataset")
        return self

    def documents(self, root: Path) -> Iterator[str]:
        """The training documents; a relative `path` is taken from `root`."""
        if self.path is not None:
            found = documents(root / self.path, template=self.template, separator=self.separator)
        else:
            found = _hub_documents(self)
        return drop_last(found, self.skip_last)


class Mixture(BaseModel):
    """Sources and how their sequences are made."""

    model_config = ConfigDict(extra="forbid")

    sources: list[Source] = Field(min_length=1)
    sequence_length: int = Field(ge=8)
    append_eos: bool = Field(True, description="end each document with the tokenizer's EOS")
    shuffle_buffer: int = Field(2000, ge=1, description="sequences shuffled at a time")

    @model_validator(mode="after")
    def _adds_up(self) -> Mixture:
        total = sum(source.proportion for source in self.sources)
        if abs(total - 1) > 1e-3:
            parts = ", ".join(f"{s.name} {s.proportion:g}" for s in self.sources)
            raise ValueError(f"proportions add up to {total:g}, not 1 ({parts})")
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(f"two sources have the same name: {', '.join(sorted(names))}")
        return self


def documents(
    path: Path, *, template: str = "{text}", separator: str | None = None
) -> Iterator[str]:
    """Yield the documents of a file or of all files below a folder, in the order of their names.

    Args:
        path: ``.txt``, ``.md``, ``.py`` (a file is one document unless `separator` is given) or
            ``.jsonl`` (a row is one document), each also as ``.gz``.
        template: how a JSON row becomes text, for example ``"{question}\\n{answer}"``.
        separator: text between two documents of a text file.

    Raises:
        TurboSparseError: nothing there, not text, broken JSON, or a row without the template's
            fields.
    """
    found = False
    for file in corpus_files(path):
        for text in _file_documents(file, template, separator):
            if text.strip():
                found = True
                yield text
    if not found:
        raise TurboSparseError(f"{path} holds no text: every document in it is empty")


def corpus_files(path: Path) -> list[Path]:
    """The readable files at or below `path`."""
    path = path.expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise TurboSparseError(f"no such file or folder: {path}")
    files = sorted(f for f in path.rglob("*") if f.is_file() and _suffix(f) in SUFFIXES)
    if not files:
        raise TurboSparseError(
            f"{path} holds no corpus file; known are {', '.join(SUFFIXES)}, also .gz"
        )
    return files


def _suffix(path: Path) -> str:
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix


def _file_documents(file: Path, template: str, separator: str | None) -> Iterator[str]:
    where = str(file)
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as raw:
            if _suffix(file) == ".jsonl":
                for number, line in enumerate(raw, 1):
                    where = f"{file}:{number}"
                    if line.strip():
                        yield _row_text(line.decode(), template, where)
            else:
                text = io.StringIO(raw.read().decode(), newline=None).read()  # \r\n too
                yield from (part.strip() for part in text.split(separator)) if separator else [text]
    except UnicodeDecodeError as error:
        raise TurboSparseError(
            f"{where} is not UTF-8 text (byte {error.object[error.start]:#04x} at {error.start}); "
            "remove it from the corpus or convert it"
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise TurboSparseError(f"{file} is a broken gzip file ({error}); fetch it again") from error


def _row_text(line: str, template: str, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise TurboSparseError(f"{where} is not valid JSON: {error}") from error
    try:
        present = {key: "" if value is None else value for key, value in row.items()}
        return template.format_map(present)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        fields = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise TurboSparseError(
            f"{where} does not fit the template {template!r}: the row has {fields}"
        ) from error


def _hub_documents(source: Source) -> Iterator[str]:
    import datasets

    try:
        rows = datasets.load_dataset(
            source.dataset, source.subset, split=source.split, streaming=True
        )
    except Exception as error:  # datasets and the hub raise many unrelated types
        raise TurboSparseError(
            f"source {source.name!r}: data set {source.dataset!r} cannot be opened "
            f"({type(error).__name__}: {error}); check its name, your access and the network"
        ) from error
    for row in rows:
        yield _row_text(json.dumps(row, default=str), source.template, f"{source.dataset}")


def drop_last(items: Iterable[str], count: int) -> Iterator[str]:
    """All items but the last `count`."""
    waiting: deque[str] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()


def take_last(items: Iterable[str], count: int | None) -> list[str]:
    """The last `count` items, or all."""
    return list(deque(items, maxlen=count))


def packed_sequences(
    texts: Iterable[str], tokenizer: Any, length: int, *, append_eos: bool
) -> Iterator[list[int]]:
    """Lay tokenised documents end to end and cut sequences of `length`; the rest is dropped."""
    end = [tokenizer.eos_token_id] if append_eos and tokenizer.eos_token_id is not None else []
    tokens: list[int] = []
    for text in texts:
        tokens += tokenizer(text, verbose=False)["input_ids"] + end
        cut = len(tokens) - len(tokens) % length
        for start in range(0, cut, length):
            yield tokens[start : start + length]
        del tokens[:cut]


def _rows(
    source: Source, root: Path, tokenizer: Any, mixture: Mixture
) -> Iterator[tuple[int, dict[str, Any]]]:
    texts = source.documents(root)
    length, eos = mixture.sequence_length, mixture.append_eos
    for number, ids in enumerate(packed_sequences(texts, tokenizer, length, append_eos=eos)):
        yield number, {"input_ids": ids, "labels": ids}


def training_stream(
    mixture: Mixture, tokenizer: Any, *, root: Path, seed: int
) -> datasets.IterableDataset:
    """An endless, reproducible stream of ``{input_ids, labels}`` rows; small sources repeat.

    Raises:
        TurboSparseError: a source cannot be read, or holds less than one sequence. Every source is
            tried before the first row is drawn.
    """
    import datasets
    from datasets.iterable_dataset import ExamplesIterable

    streams = []
    for source in mixture.sources:
        if not list(islice(_rows(source, root, tokenizer, mixture), 1)):
            raise TurboSparseError(
                f"source {source.name!r} holds less than one sequence of "
                f"{mixture.sequence_length} tokens; give more text or a shorter sequence_length"
            )
        arguments = {"source": source, "root": root, "tokenizer": tokenizer, "mixture": mixture}
        # what from_generator makes, without the lock file that it leaves in the user's cache
        stream = datasets.IterableDataset(ExamplesIterable(_rows, arguments))
        shuffled = stream.shuffle(seed=seed, buffer_size=mixture.shuffle_buffer)
        streams.append(shuffled.repeat(None))
    shares = [source.proportion for source in mixture.sources]
    exact = [share / sum(shares) for share in shares]
    return datasets.interleave_datasets(streams, probabilities=exact, seed=seed)
