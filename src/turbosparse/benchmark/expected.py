"""What `engine.expect` says of a packed folder on this machine, whose speeds are measured once."""

from __future__ import annotations

import statistics
from functools import cache
from pathlib import Path
from typing import Any

from turbosparse.base.errors import TurboSparseError
from turbosparse.base.machine import cache_folder, processor
from turbosparse.base.remembered import recall, remember
from turbosparse.benchmark.disk import Disk, known_disk
from turbosparse.engine.engine import Engine
from turbosparse.engine.expect import Reading, Unions, expect, measured, shares_of, walk
from turbosparse.hf import families
from turbosparse.hf.count import experts_in_use
from turbosparse.ops.fetching import WORTHWHILE, Rows, choose
from turbosparse.packed.format import Packed

ROUNDS = 16  # of measuring the memory
_SIZE = 256 << 20  # bytes that it is measured on


def measure_reading(packed: Packed, threads: int) -> Reading:
    """How fast rows of this model are read from memory, kept for `expected_of`.

    By the kernels: some do not reach the bandwidth, as they compute.
    """
    quant = packed.header.quant.gate
    choose(threads, WORTHWHILE)
    rows = Rows(threads, quant, _SIZE)
    # not in turn: single rows of a matrix that was just read would still be in a cache
    ways = rows.read_together, rows.read_scattered
    found = Reading(*(statistics.median(read() for _ in range(ROUNDS)) for read in ways))
    remember(_kept(), _key(threads, quant), list(found))
    return found


def known_reading(packed: Packed, threads: int) -> Reading | None:
    """As it was measured before; None if it was not, or if that is not understood."""
    known: Any = recall(_kept()).get(_key(threads, packed.header.quant.gate))
    try:
        together, scattered = (float(speed) for speed in known)
    except (ValueError, TypeError):
        return None
    return Reading(together, scattered)


def unions_of(
    packed: Packed, stats: Path | None = None, locality: float | None = None
) -> tuple[Unions, str]:
    """What neighbouring tokens have in common, and in words where that is known from.

    Args:
        packed: the model, whose profile may have it.
        stats: a statistics file that has it.
        locality: of a synthetic model.

    Raises:
        TurboSparseError: a locality that is none, or statistics of another model.
    """
    config, profile = packed.config, packed.header.profile
    experts, used = max(1, families.experts(config)), experts_in_use(config)
    if locality is not None and not 0 <= locality < 1:
        raise TurboSparseError(f"--locality {locality:g} must be 0 or more and less than 1")
    windows, source = None, ""
    if stats is not None:
        from turbosparse.packed.stats import Stats

        found = Stats.load(stats)
        found.check(config)
        windows, source = found.together("windows"), f"as {stats.name} has it"
    elif profile and locality is None:
        windows, source = profile.windows, "as the packed folder has it"
    if windows:
        return cache(measured(windows, used / experts)), source
    near = f"correlation {locality:g}" if locality else "nothing in common: the worst case"
    return cache(walk(locality or 0.0, experts, used)), near


def expected_of(engine: Engine) -> float | None:
    """Tokens/s that a model from disk should reach; None if `plan` has not measured the machine.

    None also of a model that is in memory, or whose sparsity is not known. Runs nothing.
    """
    if engine.stores is None:
        return None
    shares, reading = shares_of(engine.packed, None), known_reading(engine.packed, engine.threads)
    disk = known_disk(engine.packed)
    if not (shares and disk and reading):
        return None
    return speed_of(engine, shares, unions_of(engine.packed)[0], reading, disk)


def speed_of(
    engine: Engine,
    shares: tuple[float, float, float],
    unions: Unions,
    reading: Reading,
    disk: Disk | None,
) -> float:
    """Tokens/s of an open model by the speeds of the memory, and of its disk if it is there."""
    return expect(
        engine.packed,
        engine.stores.placement if engine.stores else None,
        engine.mode,
        shares,
        unions,
        reading=reading,
        read_seconds=disk.seconds if disk else lambda _: 0.0,
    ).tokens_per_second


def _kept() -> Path:
    return cache_folder() / "memory.json"


def _key(threads: int, quant: str) -> str:
    return f"{processor()}, {threads} threads, {quant}"
