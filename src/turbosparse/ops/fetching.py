"""How the kernels fetch rows of weights ahead of their use: found by a trial, kept for the machine.

Processors differ in what they like: one reads rows fast that are fetched one after the other, the
next only if a line of each is fetched in turn. What is computed is the same.

`TURBOSPARSE_FETCH` overrides: the way for rows that follow each other and the way for others, each
as order:cache:bytes. The orders are `none`, `stream` (one row after the other) and `aside` (a line
of each in turn); the cache is 1 or 2; the bytes say how far ahead. An example is the default,
``stream:1:8192,aside:1:8192``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from turbosparse import _core
from turbosparse.base.errors import TurboSparseError
from turbosparse.base.machine import cache_folder, processor
from turbosparse.base.remembered import recall, remember
from turbosparse.ops.rows import row_bytes

VARIABLE = "TURBOSPARSE_FETCH"
WORTHWHILE = 256 << 20  # bytes of weights from which the trial's tenth of a second pays
GAIN = 1.05  # that another way than the default must reach
ROUNDS = 5
COLS, ROWS = 4096, 7168  # of a matrix: 16 MB in q4
SIZE = 64 << 20  # bytes of the matrices of the trial, more than caches hold
PARTS = 4  # of the rows of a matrix, at random places


class Way(NamedTuple):
    """Order, nearest cache, and bytes ahead; see the module."""

    order: str
    cache: int
    bytes: int

    def __str__(self) -> str:
        return f"{self.order}:{self.cache}:{self.bytes}"


@dataclass(frozen=True)
class Fetching:
    together: Way  # rows that follow each other
    scattered: Way
    source: str = "default"

    @classmethod
    def parse(cls, text: str, source: str) -> Fetching:
        """Raises ValueError."""
        together, scattered = (_parse(way) for way in text.split(","))
        return cls(together, scattered, source)

    def use(self) -> None:
        """For all rows that this process reads from now on; raises ValueError."""
        _core.set_fetching(self.together, self.scattered)

    def __str__(self) -> str:
        return f"{self.together},{self.scattered}"


DEFAULT = Fetching(Way("stream", 1, 8192), Way("aside", 1, 8192))
_DISTANCES = product((1, 2), (0, 8192, 24576))
_TOGETHER = [
    DEFAULT.together,
    *(Way(order, *far) for far in _DISTANCES for order in ("stream", "aside")),
    Way("none", 1, 0),
]
_SCATTERED = [DEFAULT.scattered, *(way for way in _TOGETHER if way.order != "stream")]


def _parse(way: str) -> Way:
    order, cache, size = way.split(":")
    return Way(order, int(cache), int(size))


def choose(threads: int, weights: int, cache: Path | None = None) -> Fetching:
    """Make this process fetch as suits the machine, the threads and that many bytes of weights.

    Raises:
        TurboSparseError: `TURBOSPARSE_FETCH` is not understood.
    """
    file = cache or cache_folder() / "fetching.json"
    key = f"{processor()}, {_core.isa()}, {threads} threads"
    asked = os.environ.get(VARIABLE)
    try:
        found = Fetching.parse(asked, VARIABLE) if asked else _kept(file, key)
        found.use()
    except ValueError as error:
        raise TurboSparseError(
            f"{VARIABLE}={asked} is not understood ({error}); an example is {DEFAULT}"
        ) from error
    if found is not DEFAULT or weights < WORTHWHILE:
        return found
    found = measure(threads)
    remember(file, key, str(found))
    return found


def _kept(file: Path, key: str) -> Fetching:
    """What an earlier trial found; what is not understood counts for nothing."""
    try:
        found = Fetching.parse(recall(file)[key], "kept")
        found.use()
    except (ValueError, LookupError, TypeError, AttributeError):
        return DEFAULT
    return found


def measure(threads: int) -> Fetching:
    """Try the ways on random rows of q4 and take the fastest, the default unless that gains."""
    rows = Rows(threads, "q4")
    together = _fastest(
        _TOGETHER, lambda way: Fetching(way, DEFAULT.scattered).use(), rows.read_together
    )
    scattered = _fastest(_SCATTERED, lambda way: Fetching(together, way).use(), rows.read_scattered)
    found = Fetching(together, scattered, "measured")
    found.use()
    return found


class Rows:
    """Rows of a matrix, more than caches hold, to time how kernels read them.

    Each call reads others than the last ones of its kind did, and gives the bytes in a second.
    """

    def __init__(self, threads: int, quant: str, size: int = SIZE):
        self._threads, self._stride = threads, row_bytes(quant, COLS)
        count = max(2, size // (ROWS * self._stride))
        data = np.full((count, ROWS, self._stride), 44, np.uint8)
        matrices = [_core.Matrix(part, COLS, quant) for part in data]
        order = np.random.default_rng(0).permutation(ROWS).astype(np.int32)
        parts = [np.sort(part) for part in order.reshape(PARTS, -1)]
        self._whole = cycle((one, None) for one in matrices)
        self._parts = cycle((one, part) for part in parts for one in matrices)
        self._x = np.ones((1, COLS), np.float32)

    def read_together(self) -> float:
        return self._read(*next(self._whole))

    def read_scattered(self) -> float:
        return self._read(*next(self._parts))

    def _read(self, matrix: _core.Matrix, rows: NDArray[np.int32] | None) -> float:
        out = np.empty((1, ROWS if rows is None else len(rows)), np.float32)
        began = time.perf_counter()
        matrix.matmul(self._x, out, self._threads, rows)
        return out.size * self._stride / (time.perf_counter() - began)


def _fastest(ways: list[Way], use: Callable[[Way], None], read: Callable[[], float]) -> Way:
    """The way with the fastest of some rounds in turn; the first one unless another gains."""
    speeds: dict[Way, float] = {}
    for way in ways * ROUNDS:
        use(way)
        speeds[way] = max(read(), speeds.get(way, 0.0))
    best = max(speeds, key=lambda way: speeds[way])
    return best if speeds[best] > GAIN * speeds[ways[0]] else ways[0]
