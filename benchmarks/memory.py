"""A model larger than memory, each run in a control group of its limit, beside llama.cpp.

For each limit: `turbosparse bench --memory` on a synthetic model, then llama.cpp, which maps a
dense GGUF model of the same shape, with the models dropped from the page cache before each of them.
At last both without a limit, where ours takes what is available. Needs root, for the control
groups.

    python benchmarks/memory.py FOLDER --gguf FILE --limits 16GiB 12GiB 8GiB --out memory.json

makes FOLDER (27 GB with its defaults) and FILE (26 GB) where they are not there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from turbosparse.base.machine import memory_available, size_in_bytes
from turbosparse.benchmark.harness import Spread, machine
from turbosparse.benchmark.peers import LlamaCpp, PeerDied, write_random_gguf
from turbosparse.packed.format import Packed
from turbosparse.packed.synthetic import stride_of

GROUPS = Path("/sys/fs/cgroup")
# version 1 of control groups, and version 2: the limit, the peak, and where failures are counted
FILES = {
    1: ("memory.limit_in_bytes", "memory.max_usage_in_bytes", "memory.failcnt"),
    2: ("memory.max", "memory.peak", "memory.events"),
}


def main() -> None:
    arguments = parsed()
    if not arguments.folder.exists() or not arguments.gguf.exists():
        make(arguments)
    rows = []
    for limit in [*arguments.limits, None]:
        for engine in (ours, peer):
            rows.append(engine(arguments, limit))
            print(json.dumps(rows[-1]), flush=True)
    document = {"machine": machine(), "arguments": sys.argv[1:], "rows": rows}
    arguments.out.write_text(json.dumps(document, indent=1))
    Console(width=150).print(table(rows))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--limits", nargs="*", default=["16GiB", "12GiB", "8GiB"])
    parser.add_argument("--shape", default="mixtral-8x7b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--sparsity", default="0.88")
    parser.add_argument("--predictor", default="rank=256")
    parser.add_argument("--locality", type=float, default=0.8)
    parser.add_argument("--apart", action="store_true", help="not in bundles")
    parser.add_argument("--mapped", action="store_true", help="ours maps its files as well")
    parser.add_argument("--tokens", type=int, default=8, help="in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-tokens", type=int, default=2, help="of llama.cpp in a round")
    parser.add_argument("--out", type=Path, default=Path("memory.json"))
    return parser.parse_args()


def command(arguments: argparse.Namespace, *more: str) -> list[str]:
    synthetic = ["--shape", arguments.shape, "--folder", str(arguments.folder)]
    synthetic += ["--sparsity", arguments.sparsity, "--locality", str(arguments.locality)]
    synthetic += ["--predictor", arguments.predictor, "--predictor-quant", "q4"]
    synthetic += [] if arguments.apart else ["--bundle"]
    synthetic += ["--layers", str(arguments.layers)] if arguments.layers else []
    return [sys.executable, "-m", "turbosparse", "bench", *synthetic, "--json", *more]


def make(arguments: argparse.Namespace) -> None:
    if not arguments.folder.exists():
        short = ["--prompt", "1", "--tokens", "1", "--rounds", "1"]
        subprocess.run(command(arguments, *short), check=True, stdout=subprocess.DEVNULL)
    config = Packed(arguments.folder).config
    write_random_gguf(arguments.gguf, config, "q4", walks=arguments.locality > 0)


def ours(arguments: argparse.Namespace, limit: str | None) -> dict[str, Any]:
    """The row of a run of `bench`, whose caches were filled before it counts."""
    how = ["--prompt", "1", "--tokens", str(arguments.tokens), "--rounds", str(arguments.rounds)]
    if not arguments.mapped:
        how += ["--memory", limit or str(memory_available())]
    forget(arguments)
    with limited(limit) as used:
        done = subprocess.run(command(arguments, *how), check=True, stdout=subprocess.PIPE)
        found = json.loads(done.stdout.splitlines()[-1])
        return {
            "engine": "turbosparse",
            "limit": limit,
            "tokens/s": found["tokens_per_second"],
            "bandwidth, GB/s": found["bandwidth"],
            "ceiling, tokens/s": found["ceiling"],
            "expected tokens/s": found["expected"],
            "stored": found["stored"],
            **used(),
        }


def peer(arguments: argparse.Namespace, limit: str | None) -> dict[str, Any]:
    """The row of llama.cpp, after a round that does not count; the same walk through its tokens."""
    row: dict[str, Any] = {"engine": "llama.cpp", "limit": limit}
    forget(arguments)
    stride, tokens = stride_of(arguments.locality), arguments.peer_tokens
    llama = LlamaCpp(arguments.gguf, threads=2, prompt=1, stride=stride)
    with limited(limit) as used, closing(llama) as other:
        try:
            other.decode(tokens)
            speeds = [other.decode(tokens) for _ in range(arguments.rounds)]
            row["tokens/s"] = asdict(Spread.of(speeds))
        except PeerDied as died:
            row["died"] = str(died)
        return row | used()


def forget(arguments: argparse.Namespace) -> None:
    """Drop the models from the page cache: what stands there already counts for no group."""
    for path in (arguments.gguf, *arguments.folder.iterdir()):
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


@contextmanager
def limited(limit: str | None) -> Iterator[Any]:
    """Start the processes inside in a control group with this limit; yields what tells its peak."""
    if limit is None:
        yield dict
        return
    version = 2 if (GROUPS / "cgroup.controllers").is_file() else 1
    root = GROUPS if version == 2 else GROUPS / "memory"
    most, peak, failed = FILES[version]
    group = root / f"turbosparse-benchmark-{os.getpid()}"
    group.mkdir()
    try:
        (group / most).write_text(str(size_in_bytes(limit, "--limits")))
        (group / "cgroup.procs").write_text("0")
        yield lambda: {
            "peak of the group": int((group / peak).read_text()),
            "failed allocations": (group / failed).read_text().split(),
        }
    finally:
        (root / "cgroup.procs").write_text("0")
        group.rmdir()


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table("limit", "engine", "tokens/s", "found", "reads", "MB from disk", "expected")
    for row in rows:
        speed, stored = row.get("tokens/s"), row.get("stored") or {}
        cells = [
            f"{speed['median']:.3f} [{speed['least']:.3f}..{speed['greatest']:.3f}]"
            if speed
            else "died"
        ]
        names = "% of units found in the cache", "reads per token", "MB from disk per token"
        cells += [
            f"{source[name]:,.1f}" if source.get(name) else ""
            for source, name in [(stored, name) for name in names] + [(row, "expected tokens/s")]
        ]
        shown.add_row(row["limit"] or "none", row["engine"], *cells)
    return shown


if __name__ == "__main__":
    main()
