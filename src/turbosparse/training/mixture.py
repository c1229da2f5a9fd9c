"""Text for training and measuring: documents from files or the hub, packed and mixed.

A corpus is a text, JSON-lines or ``.gz`` file, a folder of them, or a hub data set.
Documents are tokenised one by one, laid end to end and cut into sequences of one length; a mixture
draws whole sequences from its sources, so that proportions hold in tokens whatever the lengths of
the documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from turbosparse.base.errors import TurboSparseError
from turbosparse.base.progress import note
from turbosparse.training import chatml
from turbosparse.training.readers import (
    Document,
    Fault,
    MissingSource,
    Row,
    corpus_files,
    drop_last,
    file_rows,
    read_rows,
    refuse,
    some,
    text_of,
)

if TYPE_CHECKING:
    import datasets

MOST_PARTS = 64  # of a source that are read apart from each other


class Skips(dict[str, set[str]]):
    """What was wrong with the unreadable documents that were skipped, by source."""

    def fault(self, source: Source) -> Fault:
        seen = self.setdefault(source.name, set())
        return (lambda message, _: seen.add(message)) if source.skip_unreadable else refuse

    def report(self) -> None:
        for name, seen in self.items():
            if seen:
                note(f"source {name!r}: skipped {len(seen)} unreadable; {min(seen)}")


class Source(BaseModel):
    """One source of a mixture: local files (`path`) or a hub data set (`dataset`)."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: str = Field(pattern=r"^\w[\w.-]*$")
    proportion: float = Field(gt=0, le=1, description="share of the training tokens")
    path: Path | None = None
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    files: list[str] | None = Field(None, description="files of the data set, with wildcards")
    where: dict[str, list[str]] = Field(
        default_factory=dict, description="rows to keep: field (a.b: in a) → its values"
    )
    format: Literal["text", "chat"] = "text"
    template: str = Field("{text}", description="how a JSON row becomes text")
    prompt: str | None = Field(None, description="template of a chat's question")
    answer: str | None = Field(None, description="template of a chat's answer")
    separator: str | None = Field(None, description="what separates documents inside a text file")
    skip_last: int = Field(0, ge=0, description="documents at the end kept out of training")
    skip_unreadable: bool = Field(False, description="skip broken documents, and count them")

    @model_validator(mode="after")
    def _one_origin(self) -> Source:
        if (self.path is None) == (self.dataset is None):
            raise ValueError(f"source {self.name!r} needs exactly one of path and dataset")
        return self

    def local(self, root: Path) -> Path | None:
        """Its files: `path`, or those in `root` that stand in for the hub set under its name."""
        if self.path is not None:
            return root / self.path
        return root / self.name if (root / self.name).exists() else None

    def parts(self, root: Path) -> int:
        """How many parts can be read apart from each other."""
        if self.skip_last:
            return 1
        if local := self.local(root):
            return min(len(corpus_files(local)), MOST_PARTS)
        return min(getattr(_open_hub(self), "num_shards", 1), MOST_PARTS)

    def rows(self, root: Path, *, part: int, of: int, fault: Fault) -> Iterator[tuple[str, Row]]:
        if local := self.local(root):
            return file_rows(corpus_files(local)[part::of], self.separator, fault)
        return _hub_rows(self, part, of)

    def documents(
        self, root: Path, *, part: int = 0, of: int = 1, fault: Fault = refuse
    ) -> Iterator[Document]:
        """The training documents; a relative `path` is taken from `root`."""
        rows = self.rows(root, part=part, of=of, fault=fault)
        found = read_rows((row for row in rows if self._keeps(row[1])), self._document, fault)
        return drop_last(found if of > 1 else some(found, f"source {self.name!r}"), self.skip_last)

    def _keeps(self, row: Row) -> bool:
        for key, kept in self.where.items():
            inner: Any = row
            for name in key.split("."):
                inner = inner.get(name) if isinstance(inner, dict) else None
            if inner not in kept:
                return False
        return True

    def _document(self, row: Row) -> Document:
        if self.format == "text":
            return text_of(row, self.template)
        if isinstance(row, str):
            raise ValueError("is a text file; a chat needs rows (.jsonl)")
        if self.prompt is None or self.answer is None:
            return chatml.messages_of(row)
        said = {"user": text_of(row, self.prompt), "assistant": text_of(row, self.answer)}
        return [{"role": role, "content": content} for role, content in said.items()]


class Mixture(BaseModel):
    """Sources and how their sequences are made."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    sources: list[Source] = Field(min_length=1)
    sequence_length: int = Field(ge=8)
    append_eos: bool = Field(True, description="end each document with the tokenizer's EOS")
    shuffle_buffer: int = Field(2000, ge=1, description="sequences shuffled at a time")
    prepared: Path | None = Field(None, description="folder that `data prepare` made of this")

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

    @property
    def chat(self) -> bool:
        return any(source.format == "chat" for source in self.sources)

    def without(self, missing: list[str]) -> Mixture:
        """The mixture of the other sources, whose proportions grow alike until they add up to 1."""
        if not missing:
            return self
        kept = [source for source in self.sources if source.name not in missing]
        total = sum(source.proportion for source in kept)
        note(
            f"without {', '.join(missing)}: {1 - total:.2%} of the mixture is missing, "
            "and the other proportions are raised to add up to 1"
        )
        raised = [s.model_copy(update={"proportion": s.proportion / total}) for s in kept]
        return self.model_copy(update={"sources": raised})


def missing_sources(mixture: Mixture, root: Path, *, allow_missing: bool) -> list[str]:
    """The names of the sources that cannot be opened; every one is tried.

    Raises:
        TurboSparseError: there are some and `allow_missing` is not set, or none is left. Its one
            line names them all.
    """
    faults = {}
    for source in mixture.sources:
        try:
            next(source.rows(root, part=0, of=1, fault=refuse), None)
        except MissingSource as error:
            faults[source.name] = str(error).removeprefix(f"source {source.name!r}: ")
        except TurboSparseError:
            pass  # it is there: what is wrong with it is said when it is read
    if faults and not (allow_missing and len(faults) < len(mixture.sources)):
        numbered = enumerate(faults.items(), 1)
        listed = " ".join(f"({n}) {name}: {fault}." for n, (name, fault) in numbered)
        raise TurboSparseError(
            f"{len(faults)} of {len(mixture.sources)} sources cannot be opened: {listed} "
            "Correct them, put files of that name into the folder of --data, "
            "or drop them with --allow-missing"
        )
    return list(faults)


def _open_hub(source: Source) -> Any:
    import datasets

    name: Any = source.dataset
    options: dict[str, Any] = {"split": source.split, "streaming": True}
    if source.files:  # as plain files: many sets have a script of their own, which no longer runs
        patterns = [f"hf://datasets/{name}/{pattern}" for pattern in source.files]
        options["data_files"] = {source.split: patterns}
        name = "parquet" if source.files[0].endswith(".parquet") else "json"
    try:
        return datasets.load_dataset(name, source.subset, **options)
    except Exception as error:  # datasets and the hub raise many unrelated types
        raise _hub_fault(source, 0, error) from error


def _hub_fault(source: Source, row: int, error: Exception) -> TurboSparseError:
    what = f"source {source.name!r}: data set {source.dataset!r}"
    why = f"({type(error).__name__}: {error}); check"
    if row == 0:
        return MissingSource(f"{what} cannot be opened {why} its name, your access and the network")
    return TurboSparseError(
        f"{what} broke off after row {row} {why} the network and give the same command again"
    )


def _hub_rows(source: Source, part: int, of: int) -> Iterator[tuple[str, Row]]:
    stream, number = _open_hub(source), 0
    try:
        for row in stream.shard(of, part, contiguous=False) if of > 1 else stream:
            number += 1
            yield f"{source.dataset}:{number}", row
    except Exception as error:  # as above
        raise _hub_fault(source, number, error) from error


def packed_sequences(
    found: Iterable[Document], tokenizer: Any, length: int, *, append_eos: bool
) -> Iterator[dict[str, list[int]]]:
    """Lay tokenised documents end to end and cut ``{input_ids, labels}`` of `length`.

    The rest is dropped, and so is a sequence in which nothing is to be learnt.
    """
    eos = tokenizer.eos_token_id if append_eos else None
    ids: list[int] = []
    labels: list[int] = []
    for document in found:
        if isinstance(document, str):
            more = learnt = tokenizer(document, verbose=False)["input_ids"]
            if eos is not None and more[-1:] != [eos]:  # some tokenizers add it themselves
                more.append(eos)
        else:
            more, learnt = chatml.tokenise(document, tokenizer)
        ids += more
        labels += learnt
        cut = len(ids) - len(ids) % length
        for start in range(0, cut, length):
            row = slice(start, start + length)
            if any(label != chatml.IGNORED for label in labels[row]):
                yield {"input_ids": ids[row], "labels": labels[row]}
        del ids[:cut], labels[:cut]


def source_sequences(
    source: Source, root: Path, tokenizer: Any, mixture: Mixture, **part: Any
) -> Iterator[dict[str, list[int]]]:
    """The packed sequences of a source, or of a part of it; see `Source.documents`."""
    length, eos = mixture.sequence_length, mixture.append_eos
    return packed_sequences(source.documents(root, **part), tokenizer, length, append_eos=eos)


def too_short(source: Source, length: int) -> TurboSparseError:
    return TurboSparseError(
        f"source {source.name!r} holds less than one sequence of {length} tokens; "
        "give more text or a shorter sequence_length"
    )


def _passes(
    source: Source, root: Path, tokenizer: Any, mixture: Mixture, fault: Fault, seed: int
) -> Iterator[tuple[int, dict[str, list[int]]]]:
    """The sequences of a source again and again, in another order each time."""
    for turn in count():
        found = source_sequences(source, root, tokenizer, mixture, fault=fault)
        shuffled = _shuffled(found, mixture.shuffle_buffer, Random(f"{seed} {turn}"))
        yield from enumerate(shuffled)


def _shuffled(items: Iterable[Any], size: int, random: Random) -> Iterator[Any]:
    """All items; each waits among `size` others until chance takes it out."""
    waiting: list[Any] = []
    for item in items:
        if len(waiting) < size:
            waiting.append(item)
            continue
        at = random.randrange(size)
        waiting[at], taken = item, waiting[at]
        yield taken
    random.shuffle(waiting)
    yield from waiting


def training_stream(
    mixture: Mixture, tokenizer: Any, *, root: Path, seed: int, skips: Skips | None = None
) -> datasets.IterableDataset:
    """An endless, reproducible stream of ``{input_ids, labels}`` rows; small sources repeat.

    A source is read from its beginning in each pass and shuffled again, by the seed and the pass.

    Unreadable documents that a source allows to be skipped are noted in `skips`.

    Raises:
        TurboSparseError: a source cannot be read, or holds less than one sequence. Every source is
            tried before the first row is drawn.
    """
    import datasets
    from datasets.iterable_dataset import ExamplesIterable

    skips = Skips() if skips is None else skips
    streams = []
    for source in mixture.sources:
        arguments = {"source": source, "root": root, "tokenizer": tokenizer, "mixture": mixture}
        arguments["fault"] = skips.fault(source)
        if next(source_sequences(**arguments), None) is None:
            raise too_short(source, mixture.sequence_length)
        # what from_generator makes, without the lock file that it leaves in the user's cache
        stream = ExamplesIterable(_passes, arguments | {"seed": seed})
        streams.append(datasets.IterableDataset(stream))
    shares = [source.proportion for source in mixture.sources]
    exact = [share / sum(shares) for share in shares]
    return datasets.interleave_datasets(streams, probabilities=exact, seed=seed)
