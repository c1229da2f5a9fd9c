"""What `engine.expect` says of a packed folder on this machine, whose speeds are measured once."""

from __future__ import annotations

import statistics
from functools import cache
from pathlib import Path

from turbosparse.base.errors import TurboSparseError
from turbosparse.base.machine import cache_folder, processor
from turbosparse.base.remembered import recall, remember
from turbosparse.benchmark.disk import Disk, known_disk
from turbosparse.benchmark.harness import Memory
from turbosparse.engine.engine import Engine
from turbosparse.engine.expect import Unions, expect, measured, shares_of, walk
from turbosparse.hf import families
from turbosparse.hf.count import experts_in_use
from turbosparse.packed.format import Packed

ROUNDS = 5  # of measuring the memory


def measure_bandwidth(threads: int) -> float:
    """GB/s of the memory, kept for `expected_of`."""
    memory = Memory(threads)
    bandwidth = statistics.median(memory.read_speed() for _ in range(ROUNDS))
    remember(_kept(), _key(threads), bandwidth)
    return bandwidth


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
    shares, bandwidth = shares_of(engine.packed, None), recall(_kept()).get(_key(engine.threads))
    disk = known_disk(engine.packed)
    if not (shares and disk and isinstance(bandwidth, float)):
        return None
    return speed_of(engine, shares, unions_of(engine.packed)[0], bandwidth, disk)


def speed_of(
    engine: Engine, shares: tuple[float, float, float], unions: Unions, bandwidth: float, disk: Disk
) -> float:
    """Tokens/s of an open model by the GB/s of the memory and the speed of the disk."""
    return expect(
        engine.packed,
        engine.stores.placement if engine.stores else None,
        engine.mode,
        shares,
        unions,
        bandwidth=bandwidth * 1e9,
        read_seconds=disk.seconds,
    ).tokens_per_second


def _kept() -> Path:
    return cache_folder() / "memory.json"


def _key(threads: int) -> str:
    return f"{processor()}, {threads} threads"
