"""How fast a model will be under a memory limit: bytes from memory and reads from disk of a token.

A cache that drops what was used least recently holds what the last W tokens needed, as many as fit.
A token misses what those did not need. So the misses follow from the union of the neurons of W
neighbouring tokens, which `analyse` measures, or which is that of a synthetic model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from turbosparse import _core
from turbosparse.engine import streaming
from turbosparse.engine.streaming import Placement
from turbosparse.hf import families
from turbosparse.hf.count import Use, experts_in_use, neurons
from turbosparse.ops import Mode
from turbosparse.ops.cost import bytes_of, needed
from turbosparse.packed.format import Packed

_NEURONS, _WINDOWS = 8192, 200

# unions(share, rows): of units of so many rows, the share that 1, 2, … neighbouring tokens need,
# where one needs this share of the rows in use
Unions = Callable[[float, int], Sequence[float]]


class Reading(NamedTuple):
    """Bytes in a second that the kernels read from memory, of rows that follow and of others."""

    together: float
    scattered: float


@dataclass(frozen=True)
class Expected:
    """Of one token. `found` is the share of the units that the cache holds."""

    mode: Mode
    memory_bytes: float
    memory_seconds: float
    found: float
    reads: float
    disk_bytes: float
    disk_seconds: float

    @property
    def tokens_per_second(self) -> float:
        return 1 / (self.memory_seconds + self.disk_seconds)


def walk(locality: float, experts: int, used: int) -> Unions:
    """Unions of a synthetic model whose tokens have this correlation from one to the next."""

    def unions(share: float, rows: int) -> Sequence[float]:
        random = np.random.default_rng(0)
        kept, fresh = locality, (1 - locality**2) ** 0.5
        units = _NEURONS // rows
        gates, routes = random.standard_normal((units, rows)), random.standard_normal((64, experts))
        seen = np.zeros((64, experts), bool)
        own = np.arange(units) % (64 * experts)
        least = NormalDist().inv_cdf(1 - share) if share < 1 else -np.inf
        union, found = np.zeros(units, bool), []
        for _ in range(_WINDOWS):
            routed = routes >= np.sort(routes, axis=1)[:, -used, None]
            seen |= routed
            union |= (gates > least).any(1) & routed.reshape(-1)[own]
            found.append(float(union.mean()))
            gates = kept * gates + fresh * random.standard_normal(gates.shape)
            routes = kept * routes + fresh * random.standard_normal(routes.shape)
        return found

    return unions


def measured(windows: dict[int, float], every: float) -> Unions:
    """Unions by what `analyse` found: shares of all neurons, by the number of tokens.

    Neurons of a unit are taken to be active independently, which hot-first order improves on.
    """
    known = sorted(windows)

    def unions(share: float, rows: int) -> Sequence[float]:
        at = np.arange(1, known[-1] + 1)
        union = np.interp(np.log(at), np.log(known), [windows[size] for size in known])
        union *= share * every / union[0]  # of another part than the active neurons
        touched = 1 - (1 - every) ** at
        inside = np.minimum(1, union / touched)
        found: list[float] = (touched * (1 - (1 - inside) ** rows)).tolist()
        return found

    return unions


def token_bytes(
    packed: Packed, mode: Mode, shares: tuple[float, float, float]
) -> tuple[Use, dict[str, float]]:
    """What a token uses of all neurons, and the bytes that it needs, by part; see `expect`."""
    config, header = packed.config, packed.header
    every = experts_in_use(config) / (families.experts(config) or 1)
    use, predictor = Use(*(every * share for share in (1.0, *shares))), header.ffn.predictor
    weigh = bytes_of(dict(header.quant), predictor)
    return use, needed(config, weigh, mode, use, predictor)


def expect(
    packed: Packed,
    placement: Placement | None,
    mode: Mode,
    shares: tuple[float, float, float],
    unions: Unions,
    *,
    reading: Reading,
    read_seconds: Callable[[float], float],
) -> Expected:
    """What a token takes.

    Args:
        packed: the model.
        placement: from `streaming.place`; None if all is in memory.
        mode: not auto.
        shares: candidates, with positive gate and active, of the neurons in use.
        unions: of neighbouring tokens.
        reading: from memory.
        read_seconds: of one of many reads of so many bytes.
    """
    config, (use, parts) = packed.config, token_bytes(packed, mode, shares)
    apart = {"dense": (), "exact": ("ups", "downs"), "predicted": ("gates", "ups", "downs")}
    scattered, size = sum(parts.get(part, 0.0) for part in apart[mode]), sum(parts.values())
    wanted = missed = reads = read = seconds = 0.0
    if placement:
        asked = {"dense": (1.0, 1.0), "exact": (1.0, shares[1]), "predicted": (shares[0],) * 2}
        gates, pairs = asked[mode]
        for kind in placement.kinds:
            share = pairs if kind == "pairs" else gates
            row, rows, frames = streaming.cache_of(packed, placement, kind)
            units = neurons(config) / rows
            union = [units * part for part in unions(share, rows)]
            wanted += union[0]
            misses = _misses(union, frames)
            number, size_of_reads = _joined(misses, units * use.every, rows * row)
            missed, reads, read = missed + misses, reads + number, read + size_of_reads
            if number:
                seconds += number * read_seconds(size_of_reads / number)
    return Expected(
        mode,
        size,
        (size - scattered) / reading.together + scattered / reading.scattered,
        1 - missed / wanted if wanted else 1.0,
        reads,
        read,
        seconds,
    )


def _misses(union: list[float], frames: float) -> float:
    """Units that a token needs and none of the last ones did, as many of these as fit."""
    if union[-1] <= frames:
        return 0.0
    new = np.diff(union, prepend=0.0)
    window = int(np.searchsorted(union, frames))  # tokens whose units do not fit any more
    # from one window to the next the noise of counting is larger than the change
    near = new[max(0, window - 2) : window + 3] if window > 2 else new[window : window + 1]
    return float(near.mean())


def _joined(misses: float, among: float, unit: int) -> tuple[float, float]:
    """Reads of so many units, at random places among others, and their bytes."""
    if misses <= 0:
        return 0.0, 0.0
    density, gap = min(1.0, misses / among), _core.Store.GAP_BYTES // unit
    apart = (1 - density) ** (gap + 1)
    between = sum(n * density * (1 - density) ** n for n in range(1, gap + 1))  # units of a miss
    size = misses * unit * (1 + between)
    return max(misses * apart, size / _core.Store.READ_BYTES), size


def shares_of(packed: Packed, sparsity: float | None) -> tuple[float, float, float] | None:
    """Candidates, with positive gate, active, as far as the folder or the given sparsity says."""
    profile, predictor = packed.header.profile, packed.header.ffn.predictor
    if sparsity is not None:
        active = 1 - sparsity
        gate: Any = active**0.5
    elif profile:
        active, gate = (
            float(np.mean(profile.per_layer(ratios)))
            for ratios in (profile.active, profile.gate_positive)
        )
    else:
        return None
    density = predictor.density if predictor else None
    return (active if density is None else density), gate, active
