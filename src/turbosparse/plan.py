"""How fast a packed model will be with so much memory, and how much memory a speed takes.

From the measured speed of the memory and of the disk, the bytes of a token, and how much tokens
that follow each other have in common. Nothing of the model is run.

    turbosparse plan mixtral-q4 --memory 8GiB
    turbosparse plan mixtral-q4 --target 2
    turbosparse plan mixtral-q4 --gpu-memory 12GiB --gpu-bandwidth 360 --link-bandwidth 12
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from turbosparse.base.errors import TurboSparseError
from turbosparse.base.folders import AnyPath, local_path
from turbosparse.base.machine import memory_available, size_in_bytes, size_text, threads_to_use
from turbosparse.benchmark.disk import disk_of
from turbosparse.benchmark.expected import measure_reading, unions_of
from turbosparse.engine import split
from turbosparse.engine.engine import Mode, has_modes
from turbosparse.engine.expect import Expected, Reading, expect, shares_of
from turbosparse.engine.streaming import place
from turbosparse.packed.format import Packed

STEP = 64 << 20  # bytes: how finely memory is searched for


@dataclass(frozen=True)
class Plan:
    """What `plan` found; seconds and bytes are of one token."""

    model: str
    memory: int
    placement: str
    neurons: str  # where it is known from what neighbouring tokens have in common
    memory_speed: list[float]  # GB/s by the kernels: rows that follow each other, and others
    disk: str | None  # None: it is not read
    expected: dict[str, float | str]
    tokens_per_second: float
    others: dict[str, float]  # tokens/s of the other modes

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table("", "", title=f"{self.model} in {size_text(self.memory)}", show_header=False)
        table.add_row("where it lies", self.placement)
        whole, some = self.memory_speed
        table.add_row("memory, by the kernels", f"{whole:.1f} GB/s, single rows {some:.1f}")
        if self.disk is not None:
            table.add_row("disk, reads at random places", self.disk)
        table.add_row("neighbouring tokens", self.neurons)
        for name, value in self.expected.items():
            table.add_row(name, value if isinstance(value, str) else f"{value:,.1f}")
        table.add_row("expected, tokens/s", f"{self.tokens_per_second:.2f}")
        for mode, speed in self.others.items():
            table.add_row(f"in {mode} mode", f"{speed:.2f}")
        return table


def plan(
    model: AnyPath,
    *,
    memory: str | None = None,
    gpu_memory: str | None = None,
    gpu_bandwidth: float | None = None,
    link_bandwidth: float | None = None,
    target: float | None = None,
    mode: Mode = "auto",
    stats: AnyPath | None = None,
    sparsity: float | None = None,
    locality: float | None = None,
    threads: int | None = None,
    measure: bool = False,
) -> Plan:
    """Say how fast a packed model will be under a memory limit, or which limit a speed needs.

    Parameters
    ----------
    model
        Packed folder.
    memory
        What the process may take, like 8GiB; by default all that is available, or with --target the
        least that reaches it.
    gpu_memory
        Instead: what to take of a card, like 8GiB. The neurons that do not fit stay on the
        processor. What is then said is the most that the bandwidths allow.
    gpu_bandwidth
        Of the card's memory, in GB/s: from its data sheet, or as bench-gpu measures it.
    link_bandwidth
        Between card and processor, in GB/s.
    target
        Tokens/s that are wanted.
    mode
        By default the fastest that the model has.
    stats
        stats.turbosparse of analyse: what neighbouring tokens have in common, where the folder was
        packed without it.
    sparsity
        Share of inactive neurons, where the folder does not say.
    locality
        Correlation of neighbouring tokens of a synthetic model. Where nothing is known, tokens are
        taken to have nothing in common, which is the worst case.
    threads
        By default all processors of this process.
    measure
        Measure the disk anew.
    """
    packed = Packed(local_path(model))
    threads = threads_to_use(threads)
    shares = shares_of(packed, sparsity)
    if shares is None:
        raise TurboSparseError(
            f"the sparsity of {model} is not known: give --sparsity, or pack it with the "
            "statistics of `turbosparse analyse`"
        )
    if target is not None and target <= 0:
        raise TurboSparseError(f"--target {target:g} must be more than 0 tokens/s")
    idle = {
        "memory": memory,
        "target": target,
        "stats": stats,
        "locality": locality,
        "measure": measure or None,
    }
    of_a_card = {"gpu-bandwidth": gpu_bandwidth, "link-bandwidth": link_bandwidth}
    if given := [name for name, value in of_a_card.items() if value is not None and not gpu_memory]:
        raise TurboSparseError(f"--{given[0]} belongs to --gpu-memory: give both, or neither")
    if gpu_memory is not None:
        if given := [name for name, value in idle.items() if value is not None]:
            raise TurboSparseError(
                f"--gpu-memory and --{given[0]} do not go together: leave out one"
            )
        card = _speed("--gpu-bandwidth", gpu_bandwidth), _speed("--link-bandwidth", link_bandwidth)
        return _of_a_card(packed, gpu_memory, *card, mode, shares, measure_reading(packed, threads))
    unions, source = unions_of(packed, local_path(stats) if stats else None, locality)
    disk, reading = disk_of(packed, again=measure), measure_reading(packed, threads)

    def all_modes(size: int) -> list[tuple[Expected, str]]:
        found = []
        for one in has_modes(packed, mode):
            where = place(packed, size, one, threads)
            expected = expect(
                packed,
                where,
                one,
                shares,
                unions,
                reading=reading,
                read_seconds=disk.seconds,
            )
            found.append((expected, str(where or "all of it in memory")))
        return sorted(found, key=lambda pair: -pair[0].tokens_per_second)

    size = size_in_bytes(memory, "--memory") if memory else memory_available()
    if target is not None:
        size = _least(all_modes, target, size, limit=memory is not None)
    (best, where), *others = all_modes(size)
    return Plan(
        model=packed.folder.name,
        memory=size,
        placement=where,
        neurons=source,
        memory_speed=[speed / 1e9 for speed in reading],
        disk=str(disk),
        expected={
            "mode": best.mode,
            "MB from memory": best.memory_bytes / 1e6,
            "ms for these": 1e3 * best.memory_seconds,
            "% of units found in the cache": 100 * best.found,
            "reads from disk": best.reads,
            "MB from disk": best.disk_bytes / 1e6,
            "ms for these reads": 1e3 * best.disk_seconds,
        },
        tokens_per_second=best.tokens_per_second,
        others={other.mode: other.tokens_per_second for other, _ in others},
    )


def _speed(flag: str, value: float | None) -> float:
    if value is None or not value > 0:
        raise TurboSparseError(f"--gpu-memory needs {flag}, in GB/s and more than 0, not {value}")
    return value


def _of_a_card(
    packed: Packed,
    memory: str,
    card: float,
    link: float,
    mode: Mode,
    shares: tuple[float, float, float],
    reading: Reading,
) -> Plan:
    where = split.split(packed, size_in_bytes(memory, "--gpu-memory"))
    speeds = {"card": card * 1e9, "link": link * 1e9, "memory": reading.scattered}
    found = [split.expect(packed, where, one, shares, **speeds) for one in has_modes(packed, mode)]
    best, *others = sorted(found, key=lambda one: -one.tokens_per_second)
    return Plan(
        model=packed.folder.name,
        memory=where.memory,
        placement=str(where),
        neurons="not looked at: those on the card are taken to be used like the others",
        memory_speed=[speed / 1e9 for speed in reading],
        disk=None,
        expected={
            "mode": best.mode,
            "MB from the card's memory": best.card_bytes / 1e6,
            f"ms for these at {card:g} GB/s": 1e3 * best.card_seconds,
            "MB from memory": best.memory_bytes / 1e6,
            "ms for these": 1e3 * best.memory_seconds,
            f"ms on the link at {link:g} GB/s": 1e3 * best.link_seconds,
        },
        tokens_per_second=best.tokens_per_second,
        others={other.mode: other.tokens_per_second for other in others},
    )


def _least(all_modes: Any, target: float, most: int, *, limit: bool) -> int:
    """The least memory that gives this speed.

    Raises:
        TurboSparseError: not even the most does.
    """

    def speed(size: int) -> float:
        try:
            return float(all_modes(size)[0][0].tokens_per_second)
        except TurboSparseError:  # too little
            return 0.0

    most = most if limit else 1 << 44
    if (best := speed(most)) < target:
        raise TurboSparseError(
            f"--target {target:g} is more than this machine reaches with {size_text(most)}: "
            f"{best:.2f} tokens/s"
        )
    low, high = 0, -(-most // STEP)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if speed(middle * STEP) >= target else (middle, high)
    return high * STEP
