"""Models larger than memory: feed-forwards stay on disk, and a cache of bounded size holds the rows
in use.

Embedding, attention, norms, router, head and predictors stay in memory. So do the gates in exact
mode, which reads all of them, where they fit. `docs/memory.md` has what was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turbosparse import _core
from turbosparse.base.errors import TurboSparseError
from turbosparse.base.machine import memory_in_use, size_text
from turbosparse.base.progress import track
from turbosparse.engine.cost import CHUNK, kept_bytes
from turbosparse.ops import Mode
from turbosparse.packed.format import Packed

UNIT_BYTES = 4 << 10  # the least that one read fetches; those of neighbours are joined
READERS = 32  # reads under way, for each kind of rows
_PASS = 64 << 20  # bytes that a pass takes beside 64 for each of CHUNK tokens and hidden feature
_LEAST_PROCESS = 128 << 20
_FRAME = 48  # bytes that the store keeps of a unit in memory
_GATES_STAY = ("pairs",)  # comes through the cache; the gates are in memory


@dataclass(frozen=True)
class Placement:
    """Where a model's bytes go under a memory limit; all fields are bytes but `kinds`."""

    memory: int
    process: int  # the program itself, and what a pass takes
    keys_values: int
    resident: int  # weights that stay
    kinds: tuple[str, ...]  # of the rows that come through the cache
    cache: int  # for these
    stored: int  # all of them

    def __str__(self) -> str:
        gates = "with gates" if self.kinds == _GATES_STAY else "gates on disk"
        return (
            f"{size_text(self.memory)} of memory: weights that stay {size_text(self.resident)} "
            f"({gates}), cache {size_text(self.cache)} for {size_text(self.stored)} on disk"
        )


def place(
    packed: Packed, memory: int, mode: Mode, threads: int, kv_bytes: int | None = None
) -> Placement | None:
    """Divide the memory; None if the whole model fits.

    Raises:
        TurboSparseError: it is too little.
    """
    sizes = dict.fromkeys(("gate", "pairs", "bundles", "neuron_order", "rest"), 0)
    for name, tensor in packed.tensors.items():
        role = packed.plan[name].role
        sizes[role if role in sizes else "rest"] += tensor.nbytes
    config = packed.config
    process = max(_LEAST_PROCESS, memory_in_use()) + _PASS + 64 * CHUNK * config.hidden_size
    one_text = kept_bytes(config) * min(4096, config.context)
    keys_values = kv_bytes or max(kept_bytes(config) * 64, min(one_text, memory // 16))
    left = memory - process - keys_values - sizes["rest"]
    kinds = ("bundles",) if packed.header.bundled else ("gate", "pairs")
    least = _least(packed, kinds, threads)
    if left >= sum(sizes[kind] for kind in kinds):
        return None
    room = left - sizes["gate"] >= max(least, sizes["pairs"] // 16)
    if room and mode != "predicted" and not packed.header.bundled:
        kinds = _GATES_STAY
    stored = sum(sizes[kind] for kind in kinds)
    resident = sizes["rest"] + (sizes["gate"] if kinds == _GATES_STAY else 0)
    cache = memory - process - keys_values - resident
    if cache < least:
        raise TurboSparseError(
            f"--memory {size_text(memory)} is too little for {packed.folder}: weights that stay "
            f"take {size_text(resident)}, keys and values {size_text(keys_values)}, the program "
            f"{size_text(process)}; give at least {size_text(memory - cache + least)}"
        )
    return Placement(memory, process, keys_values, resident, kinds, cache, stored)


def unit_rows(row_bytes: int, alignment: int, least: int) -> int:
    """Rows of a unit: a power of two whose bytes are whole blocks of the disk, and enough."""
    rows = alignment // gcd(alignment, row_bytes)
    while rows * row_bytes < least:
        rows *= 2
    return rows


def cache_of(
    packed: Packed, placement: Placement, kind: str, alignment: int = 512
) -> tuple[int, int, int]:
    """Bytes of a row, rows of a unit, and units that the cache of a kind holds.

    Those of gates and pairs hold about as many units: a neuron that is missed needs one of each.
    """
    rows, whole = _units(packed, placement.kinds, alignment)
    row, unit = rows[kind]
    return row, unit, placement.cache // whole


def _units(
    packed: Packed, kinds: Sequence[str], alignment: int
) -> tuple[dict[str, tuple[int, int]], int]:
    """Of each kind the bytes of a row and the rows of a unit; the bytes of a unit of every kind."""
    found = {}
    for kind in kinds:
        row = int(packed.tensors[_names(packed, kind)[0]].shape[1])
        found[kind] = row, unit_rows(row, alignment, UNIT_BYTES)
    return found, sum(row * unit + _FRAME for row, unit in found.values())


def _least(packed: Packed, kinds: Sequence[str], threads: int) -> int:
    """Bytes that a cache needs at least, whatever the disk asks for."""
    sizes = []
    for alignment in (1, 512, 4096):
        rows, whole = _units(packed, kinds, alignment)
        sizes.append(
            threads * max(max(1, _core.Store.TOGETHER // unit) for _, unit in rows.values()) * whole
        )
    return max(sizes)


def _names(packed: Packed, kind: str) -> list[str]:
    return [name for name, spec in packed.plan.items() if spec.role == kind]


class Stores:
    """The rows of a model that stay on disk. Loads the weights that do not.

    Attributes:
        direct: whether reads go past the page cache.

    Raises:
        FormatError: a weight file ends early.
    """

    def __init__(self, packed: Packed, placement: Placement):
        self.packed, self.placement = packed, placement
        alignments = {file.name: file.open_direct() for file in packed.files}
        self.direct = all(size > 1 for size in alignments.values())
        names = {kind: _names(packed, kind) for kind in placement.kinds}
        stored = {name for kind in names for name in names[kind]}
        orders = set(_names(packed, "neuron_order"))
        for name in track(
            [name for name in packed.plan if name not in stored | orders], "loading weights"
        ):
            packed.tensors[name] = self._load(name)
        self.rows: dict[str, Any] = {}
        self._stores: list[_core.Store] = []
        alignment = max(alignments.values())
        for kind in names:
            row, unit, units = cache_of(packed, placement, kind, alignment)
            store = _core.Store(units * unit * row, row, unit, READERS)
            self._stores.append(store)
            for name in names[kind]:
                file, offset = packed.place(name)
                count = packed.tensors[name].shape[0]
                self.rows[name] = store.add(file.descriptor, offset, count, alignment)
        for file in packed.files:
            file.forget()

    def of(self, ffn: str) -> dict[str, _core.StoredRows]:
        """Those of the feed-forward with this prefix, by kind."""
        return {kind: self.rows[ffn + kind] for kind in self.placement.kinds}

    def __str__(self) -> str:
        return f"{self.placement}" + ("" if self.direct else ", through the page cache")

    def take_counts(self) -> NDArray[np.float64]:
        """Units found, units missed, reads, bytes read and seconds waited, since the last call."""
        total = np.zeros(5)
        for store in self._stores:
            total += store.take_counts()
        return total

    def _load(self, name: str) -> NDArray[Any]:
        tensor = self.packed.tensors[name]
        file, offset = self.packed.place(name)
        return file.load(offset, tensor.nbytes).view(tensor.dtype).reshape(tensor.shape)
