"""Before training: tokenise and pack a recipe's data once, into files that are mapped, not read.

Reads a recipe and its sources, writes a folder of Arrow shards and ``prepared.json``. Training from
it draws the same mixture as from the sources, in an order that the seed alone decides, and resumes
without reading again what it has seen.

    turbosparse data prepare recipes/mistral_7b.yaml --out mistral-data --processes 32
    turbosparse data prepare recipes/mistral_7b.yaml --out mistral-data --shard 3/16
    turbosparse train recipes/mistral_7b.yaml --data mistral-data --out mistral-sparse
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from math import ceil, sqrt
from pathlib import Path
from typing import Any

import numpy as np

from turbosparse.base.errors import TurboSparseError
from turbosparse.base.folders import (
    AnyPath,
    check_free,
    local_path,
    named_disk_errors,
    new_file,
    read_config,
    write_json,
)
from turbosparse.base.progress import track
from turbosparse.training.mixture import (
    Mixture,
    Skips,
    Source,
    missing_sources,
    source_sequences,
    too_short,
)
from turbosparse.training.prepared import (
    MANIFEST,
    OF_JOBS,
    Shard,
    checksum,
    draw,
    file_size,
    request_of,
)


@dataclass(frozen=True)
class Prepared:
    """What `prepare` wrote; of each source also the share that training draws, and how often."""

    out: str
    tokens: int
    sequence_length: int
    missing: list[str]
    sources: list[dict[str, Any]]

    def __str__(self) -> str:
        lines = [f"{self.out}: {self.tokens:,} tokens in sequences of {self.sequence_length}"]
        lines += [
            f"  {row['source']}: {row['tokens']:,} tokens; asked {row['asked']:.2%}, "
            f"drawn {row['drawn']:.2%}, {row['passes']:.2f} passes; {row['unreadable']} unreadable"
            for row in self.sources
        ]
        return "\n".join(lines + [f"  {name}: missing" for name in self.missing])


@dataclass(frozen=True)
class PreparedShard:
    """What one of several jobs wrote."""

    out: str
    shard: str
    files: int
    tokens: int
    unreadable: int

    def __str__(self) -> str:
        return (
            f"{self.out}, shard {self.shard}: {self.files} files of {self.tokens:,} tokens, "
            f"{self.unreadable} unreadable. When all shards are done, give the same command "
            "without --shard: it joins them"
        )


def prepare(
    recipe: AnyPath,
    *,
    data: AnyPath | None = None,
    out: AnyPath | None = None,
    model: str | None = None,
    tokens: int | None = None,
    processes: int | None = None,
    shard: str | None = None,
    allow_missing: bool = False,
) -> Prepared | PreparedShard:
    """Tokenise and pack a recipe's data; give the same command again to resume after a stop.

    Parameters
    ----------
    recipe
        YAML file; recipes/tiny_cpu.yaml explains its keys.
    data
        Folder that the recipe's relative paths start from; by default the recipe's own folder. A
        file or folder in it with the name of a source stands in for that source's hub data set.
    out
        Folder to write; by default the recipe's data.prepared.
    model
        Use the tokenizer of this model folder or hub id instead of the recipe's.
    tokens
        Prepare for training on this many tokens instead of the recipe's.
    processes
        Read this many parts of the sources at a time; by default one for each processor.
    shard
        Do only the share I/N of the work, I from 0 to N-1: for N jobs on machines that all see OUT.
        When they are done the same command without it joins what they wrote.
    allow_missing
        Leave out sources that cannot be opened, and raise the proportions of the others.
    """
    from turbosparse.base.machine import threads_to_use
    from turbosparse.training.recipe import read_recipe, tokenizer_of

    recipe = local_path(recipe)
    number, jobs = _job(shard)
    settings = read_recipe(recipe, model=model, tokens=tokens)
    root = local_path(data or recipe.parent)
    if out is None and settings.data.prepared is None:
        raise TurboSparseError("give --out, the folder to write")
    out = local_path(out or root / str(settings.data.prepared))
    processes = threads_to_use(None) if processes is None else processes
    missing = missing_sources(settings.data, root, allow_missing=allow_missing)
    settings.data = mixture = settings.data.without(missing)
    tokenizer, length = tokenizer_of(settings), mixture.sequence_length
    request = request_of(mixture, missing, tokenizer) | {"tokens": settings.tokens}
    manifest = f"prepared-{number}-of-{jobs}.json" if shard else MANIFEST
    done = _begin(out, request)
    parts: dict[str, Callable[[], Shard]] = {}
    for source in mixture.sources:
        # Training draws a binomial number of sequences: five deviations above its mean suffice. A
        # hub set may be far larger; what is on the disk is read to its end.
        mean, of = settings.tokens / length * source.proportion, source.parts(root)
        most = ceil((mean + 5 * sqrt(mean)) / of) + 1 if source.local(root) is None else None
        for part in range(of):
            file = out / f"{source.name}-{part:04}.arrow"
            write = partial(_write, file, source, root, tokenizer, mixture, part, of, most)
            parts[file.name] = write
    mine = dict(islice(parts.items(), number, None, jobs))
    for half in out.glob(".*"):  # of a killed process
        if half.stem[1:] in (manifest, *mine):
            half.unlink()
    if shard:
        done = {name: made for name, made in done.items() if name in mine}
    with named_disk_errors(out):
        _save(out / manifest, request, done, complete=False)
        todo = [write for name, write in mine.items() if name not in done]
        for made in track(_run(todo, processes), "preparing", total=len(todo)):
            done[made.file] = made
            _save(out / manifest, request, done, complete=False)
        if shard:
            tokens = length * sum(made.sequences for made in done.values())
            unreadable = sum(made.unreadable for made in done.values())
            return PreparedShard(str(out), shard, len(done), tokens, unreadable)
        of_source = [[s for s in done.values() if s.source == m.name] for m in mixture.sources]
        sizes = [sum(shard.sequences for shard in shards) for shards in of_source]
        if 0 in sizes:
            raise too_short(mixture.sources[sizes.index(0)], length)
        _save(out / MANIFEST, request, done, complete=True)
    for joined in out.glob(OF_JOBS):
        joined.unlink()
    which, _ = draw(mixture, sizes, count=settings.tokens // length, seed=settings.seed)
    rows = [
        {
            "source": source.name,
            "tokens": sizes[n] * length,
            "asked": source.proportion,
            "drawn": float((which == n).mean()),
            "passes": float((which == n).sum()) / sizes[n],
            "unreadable": sum(shard.unreadable for shard in of_source[n]),
        }
        for n, source in enumerate(mixture.sources)
    ]
    return Prepared(str(out), sum(sizes) * length, length, missing, rows)


def _job(shard: str | None) -> tuple[int, int]:
    """The number of this job, and how many there are."""
    found = re.fullmatch(r"(\d+)/(\d+)", shard or "0/1")
    number, jobs = map(int, found.groups()) if found else (0, 0)
    if number >= jobs:
        raise TurboSparseError(f"--shard is {shard!r}; give I/N with I from 0 to N-1, such as 0/16")
    return number, jobs


def _begin(out: Path, request: dict[str, Any]) -> dict[str, Shard]:
    """Begin the folder, or resume one of the same request; returns its shards by file."""
    done: dict[str, Shard] = {}
    begun = [out / MANIFEST] if (out / MANIFEST).is_file() else []
    begun += sorted(out.glob(OF_JOBS))
    if not begun and any(out.glob("[!.]*")):  # another job may be about to write the first file
        check_free(out)
    out.mkdir(parents=True, exist_ok=True)
    for file in begun:
        old = read_config(out, file.name)
        if changed := [key for key in request if request[key] != old.get(key)]:
            raise TurboSparseError(
                f"{out} was begun with other settings ({', '.join(changed)}); "
                "remove it to start again, or give the old settings to resume"
            )
        shards = [Shard(**fields) for fields in old["shards"]]
        done |= {s.file: s for s in shards if file_size(out / s.file) == s.bytes}
    return done


def _save(file: Path, request: dict[str, Any], shards: dict[str, Shard], *, complete: bool) -> None:
    with new_file(file) as work:
        listed = [asdict(shard) for _, shard in sorted(shards.items())]
        write_json(work, request | {"complete": complete, "shards": listed})


def _run(parts: list[Callable[[], Shard]], processes: int) -> Iterator[Shard]:
    """Write parts, several at a time; a failure ends them all."""
    if min(processes, len(parts)) < 2:
        yield from (write() for write in parts)
        return
    spawn = multiprocessing.get_context("spawn")  # a fork would copy the locks of threads
    pool = ProcessPoolExecutor(min(processes, len(parts)), spawn, _follow_parent)
    try:
        for future in as_completed([pool.submit(write) for write in parts]):
            yield future.result()
    except BrokenProcessPool as error:
        raise TurboSparseError(
            "a process was killed, perhaps for its memory; "
            "give the same command again, with fewer --processes"
        ) from error
    finally:
        for child in multiprocessing.active_children():
            child.terminate()
        pool.shutdown(cancel_futures=True)


def _follow_parent() -> None:
    """End with the parent, however that ends, and not before it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent: Any = multiprocessing.parent_process()
    threading.Thread(target=lambda: parent.join() or os._exit(1), daemon=True).start()


def _write(
    path: Path,
    source: Source,
    root: Path,
    tokenizer: Any,
    mixture: Mixture,
    part: int,
    of: int,
    most: int | None,
) -> Shard:
    """Write one part, or `most` sequences; the file has its name only when it is whole."""
    from datasets import Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    column = List(Value("int32"), length=mixture.sequence_length)
    columns = ["input_ids", "labels"] if source.format == "chat" else ["input_ids"]
    features = Features({**dict.fromkeys(columns, column), "checksum": Value("uint32")})
    skips, written = Skips(), 0
    fault = skips.fault(source)
    found = source_sequences(source, root, tokenizer, mixture, part=part, of=of, fault=fault)
    with new_file(path) as file:
        with ArrowWriter(path=str(file), features=features, writer_batch_size=256) as writer:
            for sequence in islice(found, most):
                row = {key: np.array(sequence[key], np.int32) for key in columns}
                writer.write({**row, "checksum": checksum(row)})
                written += 1
            writer.finalize()
        size = file.stat().st_size
    whole = most is None or written < most or next(found, None) is None
    return Shard(source.name, path.name, written, size, len(skips[source.name]), whole)
