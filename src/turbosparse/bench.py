"""Stage 8: how fast a packed model decodes, against the machine's bandwidth and a peer.

Measures a packed folder, or a synthetic model of a named shape that is made for the run. Prints the
bytes that one token must read at the measured sparsity, the ceiling in tokens/s that the measured
read bandwidth gives, and the share of it that was reached. Rounds of the engine, the peer and the
bandwidth are interleaved; figures are medians.

    turbosparse bench mistral-q4
    turbosparse bench --shape mistral-7b --sparsity 0.9 --quant q4 --peer llama.cpp
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from turbosparse import _core, ops
from turbosparse.base.errors import TurboSparseError
from turbosparse.base.folders import AnyPath, local_path
from turbosparse.base.machine import threads_to_use
from turbosparse.base.progress import note
from turbosparse.benchmark.disk import disk_of
from turbosparse.benchmark.expected import measure_reading, speed_of, unions_of
from turbosparse.benchmark.harness import Memory, Spread, machine
from turbosparse.engine import native
from turbosparse.engine.cost import bytes_per_step
from turbosparse.engine.engine import Engine, Mode
from turbosparse.engine.expect import Reading
from turbosparse.hf.count import experts_in_use
from turbosparse.ops.rows import Quant
from turbosparse.packed.format import Packed
from turbosparse.packed.synthetic import Wanted, make_synthetic, stride_of

Result = TypeVar("Result")
_LESS = 1 << 28  # bytes that the bandwidth is measured on under a memory limit


@dataclass(frozen=True)
class Benchmark:
    """What `bench` measured; bytes are of one step of all sequences."""

    model: str
    machine: str
    isa: str
    fetching: str  # ahead of use: rows that follow each other, and others; see ops/fetching.py
    threads: int
    load: float  # average over the last minute, when the run began
    mode: str
    quant: str
    batch: int
    candidates: float  # share of neurons that the predictor let through; 1 outside predicted mode
    recall: float | None  # of predicted mode
    gate_positive: float
    activation_sparsity: float
    bytes: dict[str, float]
    bandwidth: Spread  # GB/s
    stored: dict[str, float] | None  # with --memory: where it went, and what was read from disk
    expected: float | None  # tokens/s, as `plan` works them out; of one sequence
    tokens_per_second: Spread  # of all sequences together
    ceiling: float  # tokens/s
    share_of_ceiling: Spread  # round by round: the bandwidth of shared machines wanders
    prefill_tokens_per_second: Spread | None
    peer: str | None
    peer_tokens_per_second: Spread | None
    peer_prefill_tokens_per_second: Spread | None
    ratio: Spread | None  # ours ÷ the peer's, round by round

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table("", "", title=self.model, show_header=False)
        table.add_row("machine", f"{self.machine}, {self.isa}, load {self.load:.1f}")
        table.add_row(
            "ran", f"mode {self.mode}, {self.quant}, {self.threads} threads, batch {self.batch}"
        )
        table.add_row("rows fetched ahead", self.fetching)
        if self.recall is not None:
            table.add_row("candidates", f"{self.candidates:.1%}")
            table.add_row("recall", f"{self.recall:.1%}")
        table.add_row("gate > 0", f"{self.gate_positive:.1%}")
        table.add_row("activation sparsity", f"{self.activation_sparsity:.1%}")
        for part, size in self.bytes.items():
            table.add_row(f"MB per step: {part}", f"{size / 1e6:.1f}")
        table.add_row("MB per step: all", f"{sum(self.bytes.values()) / 1e6:.1f}")
        for part, value in (self.stored or {}).items():
            table.add_row(part, f"{value:,.2f}")
        table.add_row("read bandwidth, GB/s", str(self.bandwidth))
        table.add_row("ceiling, tokens/s", f"{self.ceiling:.2f}")
        if self.expected:
            table.add_row("expected, tokens/s", f"{self.expected:.2f}")
        table.add_row("decode, tokens/s", f"{self.tokens_per_second}")
        table.add_row("share of the ceiling, round by round", str(self.share_of_ceiling))
        if self.prefill_tokens_per_second:
            table.add_row("prefill, tokens/s", str(self.prefill_tokens_per_second))
        if self.peer:
            table.add_row(f"{self.peer} decode, tokens/s", str(self.peer_tokens_per_second))
            table.add_row("ratio, round by round", str(self.ratio))
        if self.peer_prefill_tokens_per_second:
            table.add_row(
                f"{self.peer} prefill, tokens/s", str(self.peer_prefill_tokens_per_second)
            )
        return table


def bench(
    model: AnyPath | None = None,
    *,
    shape: str | None = None,
    sparsity: float | None = None,
    quant: Quant | None = None,
    layers: int | None = None,
    predictor: str | None = None,
    predictor_quant: Quant | None = None,
    mode: Mode = "auto",
    threads: int | None = None,
    batch: int = 1,
    tokens: int = 16,
    prompt: int = 16,
    prefill: int = 0,
    rounds: int = 5,
    peer: Literal["llama.cpp", "openvino"] | None = None,
    folder: AnyPath | None = None,
    memory: str | None = None,
    locality: float = 0.0,
    bundle: bool = False,
) -> Benchmark:
    """Measure decoding speed against the machine's bandwidth, and against a peer in the same run.

    Parameters
    ----------
    model
        Packed folder; or leave it out and name a --shape.
    shape
        Make a synthetic model: mistral-7b, mixtral-8x7b, afm-4.5b, llama-1b or
        llama-15m.
    sparsity
        Of the synthetic model, by default 0.9: share of neurons that its tokens leave inactive,
        truly computed. 0 makes a swiglu model.
    quant
        Of the synthetic model, by default q4.
    layers
        Of the synthetic model: fewer than the shape has, to fit a machine.
    predictor
        Of the synthetic model: rank=N makes one of two matrices that knows its neurons well, sign
        one that compares signs and knows little of random weights.
    predictor_quant
        Of the two matrices of the synthetic model's predictor, by default q8.
    mode
        exact skips neurons that are exactly zero; predicted also those that the predictor does not
        pick, and is what auto takes if a --predictor is asked for; dense reads all.
    threads
        By default all processors of this process.
    batch
        Sequences decoded together, up to 16.
    tokens
        Tokens decoded in a round, for each sequence.
    prompt
        Tokens that each sequence holds before.
    prefill
        Also measure reading a prompt of this many tokens.
    rounds
        Rounds; engine, peer and bandwidth take turns.
    peer
        llama.cpp: the dense model of the same shape and quantisation (needs the bench extra and
        llama-cpp-python). openvino: a dense Llama of the same shape in int4, blocks of 32 (needs
        openvino); its activations and keys are 8 bits.
    folder
        Keep the synthetic model here and use it again; by default it is removed after the run.
    memory
        What the process may take of the memory, like 8GiB; a larger model runs from disk. Rounds
        begin when the cache was filled once.
    locality
        Correlation of the synthetic model's hidden states from a token to the next. 0 takes random
        tokens, which have the least in common.
    bundle
        Of the synthetic model: gate, up and down of a neuron lie side by side, as `pack --bundle`
        puts them.
    """
    if (model is None) == (shape is None):
        raise TurboSparseError("give either a packed folder or a --shape")
    if not 1 <= batch <= 16:
        raise TurboSparseError(f"--batch {batch} must be 1 to 16")
    if peer and batch > 1:
        raise TurboSparseError(f"{peer} is measured with one sequence: leave out --batch {batch}")
    if min(tokens, prompt, rounds) < 1 or prefill < 0:
        raise TurboSparseError(
            f"--tokens {tokens}, --prompt {prompt} and --rounds {rounds} must be 1 or more, "
            f"--prefill {prefill} 0 or more"
        )
    synthetic: dict[str, object] = {
        "sparsity": sparsity,
        "quant": quant,
        "layers": layers,
        "predictor": predictor,
        "predictor-quant": predictor_quant,
        "folder": folder,
        "locality": locality or None,
        "bundle": bundle or None,
    }
    if not 0 <= locality < 1:
        raise TurboSparseError(f"--locality {locality:g} must be 0 or more and less than 1")
    if model:
        _refuse_idle(model, synthetic)
    if predictor_quant and not (predictor or "").startswith("rank="):
        raise TurboSparseError(f"--predictor-quant {predictor_quant} needs a --predictor rank=N")
    if predictor and mode == "auto":
        mode = "predicted"
    threads = threads_to_use(threads)
    load = os.getloadavg()[0]
    wanted = Wanted(
        str(shape),
        0.9 if sparsity is None else sparsity,
        layers,
        predictor,
        predictor_quant or "q8",
        walks=locality > 0,
        bundled=bundle,
    )
    kept = local_path(folder) if folder else None
    with nullcontext(model) if model else _synthetic(kept, quant or "q4", wanted) as path:
        # before the engine, which takes what the limit leaves
        reading = measure_reading(Packed(path), threads) if batch == 1 else None
        speed = Memory(threads, _LESS) if memory else Memory(threads)
        engine = Engine(path, mode=mode, threads=threads, memory=memory)
        ours = _Ours(engine, batch, prompt, locality)
        with _peer(peer, engine.packed, threads, prompt) as other:
            decode, prefills, bandwidths = _rounds(ours, other, speed, rounds, tokens, prefill)
        expected = _expected(engine, ours, reading) if reading else None
        return _card(engine, ours, decode, prefills, bandwidths, load, peer, expected)


def _refuse_idle(model: AnyPath, synthetic: dict[str, object]) -> None:
    given = [f"--{name} {value}" for name, value in synthetic.items() if value is not None]
    if given:
        raise TurboSparseError(
            f"{', '.join(given)}: only for a synthetic model; {model} is packed already, leave "
            "them out or name a --shape instead of it"
        )


@contextmanager
def _synthetic(folder: Path | None, quant: str, wanted: Wanted) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() if folder is None else nullcontext(None) as temporary:
        path = folder or Path(str(temporary)) / f"{wanted.shape}-{quant}"
        if not path.exists():
            make_synthetic(path, wanted, quant=quant)
        kept = Packed(path)
        if (kept.header.source, kept.quant) != (str(wanted), quant):
            raise TurboSparseError(
                f"{path} holds {kept.header.source}, {kept.quant}, not {wanted}, {quant}; "
                "remove it or choose another --folder"
            )
        yield path


@contextmanager
def _peer(name: str | None, packed: Packed, threads: int, prompt: int) -> Iterator[Any]:
    if name is None:
        yield None
        return
    from turbosparse.benchmark.peers import PEERS

    with PEERS[name].like(packed, threads=threads, prompt=prompt) as peer:
        yield peer


class _Ours:
    """The engine under measurement: random tokens, so that no two steps use the same neurons.

    With a `locality` each sequence walks through the vocabulary of a synthetic model instead.
    """

    def __init__(self, engine: Engine, batch: int, prompt: int, locality: float = 0.0):
        if not isinstance(engine.decoder, native.Decoder):
            raise TurboSparseError("bench measures the cpu backend")
        self.engine, self.decoder, self.batch, self.prompt = engine, engine.decoder, batch, prompt
        self.random = np.random.default_rng(0)
        self.mode = engine.mode
        self.counts: list[NDArray[np.int32]] = []
        self.stride = stride_of(locality)
        self.locality, self.at, self.read = locality, 0, np.zeros(5)

    def _tokens(self, count: int) -> list[int]:
        vocabulary = self.decoder.vocabulary
        if not self.stride:
            return [int(t) for t in self.random.integers(0, vocabulary, count)]
        self.at += count
        return [step * self.stride % vocabulary for step in range(self.at - count, self.at)]

    def fill(self) -> None:
        """Decode until the store was filled once, then forget what was counted."""
        stores = self.engine.stores
        before = -1.0
        while stores and before < self.read[3] < stores.placement.cache:
            before = self.read[3]
            self.decode(4)
        self.counts.clear()
        self.read[:] = 0

    def stored(self) -> dict[str, float] | None:
        """What was read from disk since `fill`, for each token."""
        if (stores := self.engine.stores) is None:
            return None
        found, missed, reads, size, waited = self.read / (len(self.counts) * self.batch)
        place = stores.placement
        return {
            "GB of memory": place.memory / 1e9,
            "GB of weights that stay": place.resident / 1e9,
            "GB of cache": place.cache / 1e9,
            "GB on disk": place.stored / 1e9,
            "% of units found in the cache": 100 * found / max(1.0, found + missed),
            "reads per token": reads,
            "MB from disk per token": size / 1e6,
            "ms of threads waiting per token": 1e3 * waited,
        }

    def shares(self) -> tuple[float, float, float]:
        """Candidates, with positive gate and active, of the neurons in use."""
        used = self.engine.config.intermediate_size * experts_in_use(self.engine.config)
        candidates, gate, active = np.stack(self.counts).mean((0, 1, 2)) / used
        return float(candidates), float(gate), float(active)

    def decode(self, tokens: int) -> float:
        """Tokens/s of all sequences together."""
        caches = [self.decoder.new_cache(self.engine.context) for _ in range(self.batch)]
        self.decoder.step([self._tokens(self.prompt) for _ in caches], caches, mode=self.mode)
        stores = self.engine.stores
        if stores:
            stores.take_counts()  # those of the prompt
        began = time.perf_counter()
        for _ in range(tokens):
            _, counts = self.decoder.step([self._tokens(1) for _ in caches], caches, mode=self.mode)
            self.counts.append(counts)
        seconds = time.perf_counter() - began
        if stores:
            self.read += stores.take_counts()
        return self.batch * tokens / seconds

    def recall(self, tokens: int = 32) -> float | None:
        """Active neurons in predicted mode ÷ in exact mode, same tokens after the same cache."""
        if self.mode != "predicted":
            return None
        before, text = self._tokens(self.prompt), self._tokens(tokens)
        active = {}
        modes: tuple[ops.Mode, ...] = ("predicted", "exact")
        for mode in modes:
            cache = self.decoder.new_cache(self.engine.context)
            self.decoder.step([before], [cache], mode="exact")
            _, counts = self.decoder.step([text], [cache], mode=mode)
            active[mode] = float(counts[..., 2].sum())
        return active["predicted"] / max(1, active["exact"])

    def prefill(self, tokens: int) -> float:
        with self.engine.sequence(self._tokens(tokens)) as sequence:
            began = time.perf_counter()
            self.engine.step([sequence])
            return tokens / (time.perf_counter() - began)


def _rounds(
    ours: _Ours, other: Any, memory: Memory, rounds: int, tokens: int, prefill: int
) -> tuple[list[list[float]], list[list[float]], list[float]]:
    """Interleaved rounds: decode and prefill tokens/s as [ours, peer's], and GB/s."""
    decode: list[list[float]] = [[], []]
    prefills: list[list[float]] = [[], []]
    bandwidths = []
    ours.decode(2)  # the first pass maps the weights
    alive = other and _try(partial(other.decode, 2))
    ours.fill()
    for _ in range(rounds):
        around = [memory.read_speed()]
        decode[0].append(ours.decode(tokens))
        around.append(memory.read_speed())
        bandwidths.append(statistics.fmean(around))
        if prefill:
            prefills[0].append(ours.prefill(prefill))
        alive = alive and _try(partial(_both, other, tokens, prefill))
        for kept, speed in zip((decode, prefills), alive or (), strict=False):
            kept[1].append(speed)
    return decode, prefills, bandwidths


def _both(side: Any, tokens: int, prefill: int) -> list[float]:
    """Tokens/s of decoding and, if asked for, of reading a prompt."""
    return [side.decode(tokens), *([side.prefill(prefill)] if prefill else [])]


def _try(measure: Callable[[], Result]) -> Result | None:
    """What a peer measures; None, with a line that says why, if it died of it."""
    from turbosparse.benchmark.peers import PeerDied

    try:
        return measure()
    except PeerDied as died:
        note(f"{died}; the rest is measured without it")
        return None


def _expected(engine: Engine, ours: _Ours, reading: Reading) -> float:
    unions, _ = unions_of(engine.packed, locality=ours.locality)
    disk = disk_of(engine.packed) if engine.stores else None
    return speed_of(engine, ours.shares(), unions, reading, disk)


def _card(
    engine: Engine,
    ours: _Ours,
    decode: list[list[float]],
    prefills: list[list[float]],
    bandwidths: list[float],
    load: float,
    peer: str | None,
    expected: float | None,
) -> Benchmark:
    batch, threads = ours.batch, engine.threads
    counts = np.stack(ours.counts)  # [steps, layers, batch, 3]
    candidates, gate, active = ours.shares()
    sizes = bytes_per_step(engine, counts, ours.prompt + len(ours.counts) / len(decode[0]) / 2)
    speed, bandwidth = Spread.of(decode[0]), Spread.of(bandwidths)
    total = sum(sizes.values())
    ceiling = batch * bandwidth.median * 1e9 / total
    shares = [
        rate * total / (batch * 1e9 * near)
        for rate, near in zip(decode[0], bandwidths, strict=True)
    ]
    ratios = [a / b for a, b in zip(*decode, strict=False)]
    return Benchmark(
        model=engine.packed.header.source,
        machine=machine(),
        isa=_core.isa(),
        fetching=f"{ours.decoder.fetching} ({ours.decoder.fetching.source})",
        threads=threads,
        load=load,
        mode=engine.mode,
        quant=engine.packed.quant,
        batch=batch,
        candidates=candidates,
        recall=ours.recall(),
        gate_positive=gate,
        activation_sparsity=1 - active,
        bytes=sizes,
        bandwidth=bandwidth,
        stored=ours.stored(),
        expected=expected,
        tokens_per_second=speed,
        ceiling=ceiling,
        share_of_ceiling=Spread.of(shares),
        prefill_tokens_per_second=Spread.of(prefills[0]) if prefills[0] else None,
        peer=peer if decode[1] else None,
        peer_tokens_per_second=Spread.of(decode[1]) if decode[1] else None,
        peer_prefill_tokens_per_second=Spread.of(prefills[1]) if prefills[1] else None,
        ratio=Spread.of(ratios) if ratios else None,
    )
