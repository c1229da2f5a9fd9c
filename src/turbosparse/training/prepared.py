"""Training from the folder that `data prepare` wrote: mapped shards, in an order of the seed."""

from __future__ import annotations

import hashlib
import json
import zlib
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turbosparse.base.errors import TurboSparseError
from turbosparse.base.folders import read_config
from turbosparse.training.mixture import Mixture, Skips, missing_sources, training_stream
from turbosparse.training.recipe import Recipe

MANIFEST = "prepared.json"
OF_JOBS = "prepared-*-of-*.json"  # before they are joined


_PROBE = "Two  words,\n\ta tab; naïve façade 12345 €1.50 数学 🙂 <|im_start|>user\n<|im_end|></s>"


@dataclass(frozen=True)
class Shard:
    """A file of sequences: one part of a source, or its beginning."""

    source: str
    file: str
    sequences: int
    bytes: int
    unreadable: int
    whole: bool  # the part was read to its end


def request_of(mixture: Mixture, missing: list[str], tokenizer: Any) -> dict[str, Any]:
    """What decides on the sequences; another request makes another folder."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    probe = [tokenizer.eos_token_id, tokenizer(_PROBE, verbose=False)["input_ids"]]
    behaviour = hashlib.sha256(json.dumps([vocabulary, probe]).encode()).hexdigest()
    fields = mixture.model_dump(mode="json", exclude={"prepared", "shuffle_buffer"})
    return fields | {"version": 1, "missing": missing, "tokenizer": behaviour}


def file_size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


def checksum(row: dict[str, NDArray[Any]]) -> int:
    return zlib.crc32(b"".join(row[key].astype("<i4").tobytes() for key in sorted(row)))


def found_mixture(mixture: Mixture, root: Path, *, allow_missing: bool) -> Mixture:
    """The mixture of the sources that can be opened, with the prepared folder that stands for them.

    Raises:
        TurboSparseError: sources are missing, all of them named, and `allow_missing` is not set; or
            the prepared folder is not complete.
    """
    named = root / mixture.prepared if mixture.prepared else None
    begun = (root / MANIFEST).is_file() or any(root.glob(OF_JOBS))
    folder = root if begun else named
    if folder is None:
        return mixture.without(missing_sources(mixture, root, allow_missing=allow_missing))
    made = {} if any(folder.glob(OF_JOBS)) else read_config(folder, MANIFEST)
    if not made.get("complete"):
        raise TurboSparseError(
            f"{folder} is not prepared to its end; give the same `turbosparse data prepare` again, "
            "without --shard"
        )
    missing = made["missing"]
    if missing and not allow_missing:
        raise TurboSparseError(
            f"{folder} was prepared without {', '.join(missing)}; "
            "prepare another with them, or give --allow-missing"
        )
    return mixture.without(missing).model_copy(update={"prepared": folder.absolute()})


def training_data(recipe: Recipe, tokenizer: Any, *, root: Path, skips: Skips) -> Any:
    """What the Trainer reads: sequences of a prepared folder, or a stream from the sources."""
    mixture, folder = recipe.data, recipe.data.prepared
    if folder is None:
        return training_stream(mixture, tokenizer, root=root, seed=recipe.seed, skips=skips)
    made = read_config(folder, MANIFEST)
    mine = request_of(mixture, made["missing"], tokenizer)
    if changed := [key for key in mine if mine[key] != made.get(key)]:
        raise TurboSparseError(
            f"{folder} was prepared with other settings ({', '.join(changed)}) than the recipe "
            "and its model have; prepare another folder"
        )
    shards = [Shard(**fields) for fields in made["shards"]]
    cut = sorted({shard.source for shard in shards if not shard.whole})
    if cut and recipe.tokens > made["tokens"]:
        raise TurboSparseError(
            f"{folder} was prepared for {made['tokens']} tokens and holds only the beginning of "
            f"{', '.join(cut)}; the recipe wants {recipe.tokens}: prepare another folder"
        )
    count = recipe.steps() * recipe.batch_size
    return Sequences(folder, shards, mixture, count=count, seed=recipe.seed)


class Sequences:
    """The `count` sequences of a training run, in an order that the seed alone decides."""

    def __init__(
        self, folder: Path, shards: list[Shard], mixture: Mixture, *, count: int, seed: int
    ):
        of = [[s for s in shards if s.source == source.name] for source in mixture.sources]
        self.files = [[_File(folder / shard.file, shard.bytes) for shard in found] for found in of]
        self.starts = [[0, *accumulate(shard.sequences for shard in found)] for found in of]
        sizes = [starts[-1] for starts in self.starts]
        self.which, self.position = draw(mixture, sizes, count=count, seed=seed)

    def __len__(self) -> int:
        return len(self.which)

    def __getitem__(self, index: int) -> dict[str, NDArray[np.int64]]:
        source, position = int(self.which[index]), int(self.position[index])
        file = bisect_right(self.starts[source], position) - 1
        return self.files[source][file].read(position - self.starts[source][file])


class _File:
    """A mapped shard; what is wrong with it is said with its name."""

    def __init__(self, path: Path, size: int):
        import datasets

        self.path = path
        if file_size(path) != size:
            raise self._fault(f"has {file_size(path)} bytes instead of {size}")
        try:
            self.rows = datasets.Dataset.from_file(str(path)).with_format("numpy")
        except Exception as error:  # Arrow's own types and many others
            raise self._fault(f"is corrupt ({error})") from error

    def read(self, number: int) -> dict[str, NDArray[np.int64]]:
        try:
            row = self.rows[number]
            whole = int(row.pop("checksum")) == checksum(row)
        except Exception as error:  # as above
            raise self._fault(f"is corrupt ({error})") from error
        if not whole:
            raise self._fault(f"is corrupt: sequence {number} is not what was written")
        return {"labels": row["input_ids"], **row}

    def _fault(self, what: str) -> TurboSparseError:
        return TurboSparseError(
            f"{self.path} {what}; delete it and give the same `turbosparse data prepare` again"
        )


def draw(
    mixture: Mixture, sizes: list[int], *, count: int, seed: int
) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    """For each of `count` sequences its source, and its number among the `sizes` of that source.

    A source is gone through in a new order each time; more sequences leave the first as they are.
    """
    edges = np.cumsum([source.proportion for source in mixture.sources])
    lots = np.random.default_rng(seed).random(count) * edges[-1]
    which = np.searchsorted(edges[:-1], lots, side="right")
    position = np.empty(count, np.int64)
    for source, size in enumerate(sizes):
        drawn = np.flatnonzero(which == source)
        for turn, start in enumerate(range(0, len(drawn), size)):
            order = np.random.default_rng((seed, source, turn)).permutation(size)
            at = drawn[start : start + size]
            position[at] = order[: len(at)]
    return which.astype(np.int16), position
