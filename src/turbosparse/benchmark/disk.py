"""How fast a disk reads at random places, by the size of reads and how many are under way."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from turbosparse import _core
from turbosparse.base.machine import cache_folder, processor
from turbosparse.base.remembered import recall, remember
from turbosparse.packed.format import Packed

SIZES = (4 << 10, 16 << 10, 64 << 10, 128 << 10)
DEPTHS = (1, 8, 32)
SECONDS = 0.25  # of each size and depth
_BLOCK = 512
_APART = 128 << 10  # what lies closer may be joined with it


@dataclass(frozen=True)
class Disk:
    """`reads[depth][i]` are reads of `sizes[i]` bytes in a second."""

    sizes: list[int]
    reads: dict[int, list[float]]

    def seconds(self, size: float) -> float:
        """Of one read of so many bytes, with many under way."""
        rates = self.reads[max(self.reads)]
        return float(np.interp(size, self.sizes, [1 / rate for rate in rates]))

    def __str__(self) -> str:
        rates = self.reads[max(self.reads)]
        return ", ".join(
            f"{rate / 1e3:.1f} k/s of {size >> 10} KiB ({rate * size / 1e6:.0f} MB/s)"
            for size, rate in zip(self.sizes, rates, strict=True)
        )


def disk_of(packed: Packed, *, cache: Path | None = None, again: bool = False) -> Disk:
    """That of a packed folder: measured once, some seconds, for a processor and a file system."""
    known = None if again else known_disk(packed, cache=cache)
    if known:
        return known
    disk = measure(packed)
    remember(cache or _kept(), _key(packed), disk.reads)
    return disk


def known_disk(packed: Packed, *, cache: Path | None = None) -> Disk | None:
    """As it was measured before; None if it was not, or if that is not understood."""
    known: Any = recall(cache or _kept()).get(_key(packed))
    try:
        reads = {depth: [float(x) for x in known[str(depth)]] for depth in DEPTHS}
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    whole = all(len(rates) == len(SIZES) for rates in reads.values())
    return Disk(list(SIZES), reads) if whole else None


def _kept() -> Path:
    return cache_folder() / "disk.json"


def _key(packed: Packed) -> str:
    return f"{processor()}, device {packed.folder.stat().st_dev}"


def measure(packed: Packed) -> Disk:
    """Read random places of the largest weight file, past the page cache where that is possible."""
    file = max(packed.files, key=lambda file: file.data.nbytes)
    file.open_direct()
    size = file.data.nbytes - 4096
    random = np.random.default_rng(os.getpid())
    reads: dict[int, list[float]] = {}
    for depth in DEPTHS:
        rates = []
        for length in SIZES:
            store = _core.Store(64 << 20, _BLOCK, length // _BLOCK, depth)
            rows = store.add(file.descriptor, 4096, size // _BLOCK, _BLOCK)
            places = np.arange(0, size // _BLOCK - length // _BLOCK, (_APART + length) // _BLOCK)
            some = min(len(places), 512, store.units)  # as many as a feed-forward asks for
            done, began = 0, time.perf_counter()
            while (passed := time.perf_counter() - began) < SECONDS:
                chosen = np.sort(random.choice(places, some, replace=False))
                rows.fetch(chosen.astype(np.int32))
                done += int(store.take_counts()[2])
            rates.append(max(done, 1) / passed)
        reads[depth] = rates
    return Disk(list(SIZES), reads)
