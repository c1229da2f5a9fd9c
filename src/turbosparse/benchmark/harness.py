"""What every benchmark measures with: rounds and their spread, the memory's speed, the machine."""

from __future__ import annotations

import os
import platform
import statistics
import time
from dataclasses import dataclass

import numpy as np

from turbosparse import _core
from turbosparse.base.machine import processor

READS = 4  # of the memory for one measurement: some 50 ms


@dataclass(frozen=True)
class Spread:
    """Median, least and greatest of some rounds."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.least:.2f}..{self.greatest:.2f}]"


class Memory:
    """An array larger than the caches, to measure the machine's read bandwidth with."""

    def __init__(self, threads: int, size: int = 1 << 29):
        self._data, self._threads = np.ones(size // 8, np.uint64), threads
        self._cache = max((1, 2), key=self._speed)  # processors differ in what they like

    def read_speed(self) -> float:
        """GB/s of reading the array a few times."""
        return self._speed(self._cache)

    def _speed(self, cache: int) -> float:
        began = time.perf_counter()
        for _ in range(READS):
            _core.read_all(self._data, self._threads, cache)
        return READS * self._data.nbytes / (time.perf_counter() - began) / 1e9


def machine() -> str:
    """System, processor and number of processors, as a reader of the figures must know them."""
    parts = f"{platform.system()} {platform.machine()}", processor()
    return ", ".join([*filter(None, parts), f"{os.cpu_count()} processors"])
