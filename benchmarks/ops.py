"""Time the feed-forward and a matrix product at a decode step, against the measured bandwidth.

    python benchmarks/ops.py --hidden 4096 --neurons 14336 --quant q4 --copies 3 --isa avx512,avx2

Weights are random; a constant direction in the input that the gate rows lean against sets the
sparsity, so that the activity is computed, not faked. Several copies are cycled, more than fits in
the caches. Rounds are interleaved.

    python benchmarks/ops.py --base main --quant q4

compares this working tree with another commit: each runs its own core and its own ops.py, in turn.

    python benchmarks/ops.py --layer --quant q4

reads the matrices of a layer by size instead, from memory and from the caches, and says what a
parallel section costs.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from base import compare

from turbosparse import _core
from turbosparse.base.machine import threads_to_use
from turbosparse.benchmark.harness import Memory, Spread, machine
from turbosparse.ops import backend, fetching
from turbosparse.ops.quant import quantise_ffn
from turbosparse.ops.rows import QUANTS, FFNRows, row_bytes

RELATIVE_RMS = 1e-4  # of a kernel against the reference, before it is timed


def make_ffn(
    hidden: int, neurons: int, quant: str, sparsity: float
) -> tuple[FFNRows, torch.Tensor]:
    """Rows, and an input ``[1, hidden]`` at which about `sparsity` of the neurons is zero."""
    positive = (1 - sparsity) ** 0.5  # gate and up are independent
    lean = float(torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - positive)))
    rows = torch.randn(3, neurons, hidden) / hidden**0.5
    x = torch.randn(1, hidden)
    x[0, 0] = 1.0
    rows[:2, :, 0] = -lean
    return quantise_ffn(rows, (quant,) * 3), x


HEADS, KV_HEADS = 32, 8  # of the layer whose matrices are read
SECTIONS = 2000  # without work, timed together


def read_layer(args: argparse.Namespace, threads: int) -> None:
    """Print how fast the matrices of a layer are read, by size, and what a section costs."""
    fetching.choose(threads, fetching.WORTHWHILE)
    rows = {
        "k, v": args.hidden // HEADS * KV_HEADS,
        "q, o": args.hidden,
        "q + k + v": args.hidden // HEADS * (HEADS + 2 * KV_HEADS),
        "gate": args.neurons,
    }
    stride = row_bytes(args.quant, args.hidden)
    data = np.random.default_rng(0).integers(0, 45, (args.neurons * 8, stride), dtype=np.uint8)
    x, memory = np.ones((1, args.hidden), np.float32), Memory(threads)
    ways = {
        (name, copies): [
            _core.Matrix(data[n * i : n * (i + 1)], args.hidden, args.quant) for i in at
        ]
        for name, n in rows.items()
        for copies, at in (("memory", range(len(data) // n)), ("caches", [0] * 8))
    }
    seconds: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
    sections, bandwidths = [], []
    for _ in range(args.rounds):
        bandwidths.append(memory.read_speed())
        for way, matrices in ways.items():
            out = np.empty((1, matrices[0].rows), np.float32)
            began = time.perf_counter()
            for matrix in matrices:
                matrix.matmul(x, out, threads)
            seconds[way].append((time.perf_counter() - began) / len(matrices))
        began = time.perf_counter()
        _core.run_sections(SECTIONS, threads)
        sections.append((time.perf_counter() - began) / SECTIONS * 1e6)
    print(f"{machine()}, {_core.isa()}, {threads} threads, load {os.getloadavg()[0]:.1f}")
    print(f"{args.quant}, {args.hidden} columns; read bandwidth {Spread.of(bandwidths)} GB/s")
    for (name, where), times in seconds.items():
        size = rows[name] * stride
        speed = Spread.of([size / t / 1e9 for t in times])
        print(f"  {name:10} {rows[name]:6} rows {size / 1e6:6.2f} MB from {where}: {speed} GB/s")
    print(f"  a section without work: {Spread.of(sections)} µs")


def flags_for_both(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[str]:
    """The flags that were given, without those that only say what to compare."""
    given = {k: v for k, v in vars(args).items() if k not in ("base", "pairs")}
    return [f"--{k}={v}" for k, v in given.items() if v != parser.get_default(k)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--neurons", type=int, default=8192)
    parser.add_argument("--quant", choices=QUANTS, default="q4")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--copies", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--tokens", type=int, default=1, help="copies of the input in a call")
    parser.add_argument(
        "--isa",
        default=_core.isa(),
        help="instruction sets to compare, with commas; `torch` is the reference backend",
    )
    parser.add_argument("--layer", action="store_true", help="read the matrices of a layer instead")
    base = parser.add_argument_group("comparing with another commit")
    base.add_argument("--base", metavar="REV", help="a commit; the other flags are for both")
    base.add_argument("--pairs", type=int, default=5, help="runs of each of the two")
    args = parser.parse_args()
    if args.base:
        print(compare("ops.py", args.base, flags_for_both(parser, args), args.pairs))
        return
    del args.base, args.pairs
    threads = threads_to_use(args.threads)
    if args.layer:
        read_layer(args, threads)
        return
    fetching.choose(threads, fetching.WORTHWHILE)
    torch.set_num_threads(threads)
    torch.manual_seed(0)

    stored, x = make_ffn(args.hidden, args.neurons, args.quant, args.sparsity)
    truth, counts = backend("torch").Neurons(stored, "drelu", 1).forward(x, x, mode="dense")
    _, gate, active = counts[0].tolist()
    stride = row_bytes(args.quant, args.hidden)
    moved = {"dense": 3 * stride * args.neurons, "exact": stride * (args.neurons + gate + active)}

    x = x.repeat(args.tokens, 1)
    truth = truth.repeat(args.tokens, 1)
    layers: dict[str, tuple[list[Any], list[Any]]] = {}
    for name in {"torch" if isa == "torch" else "cpu" for isa in args.isa.split(",")}:
        copies = [
            replace(stored, gates=stored.gates.copy(), pairs=stored.pairs.copy())
            for _ in range(args.copies)
        ]
        layers[name] = (
            [backend(name).Neurons(c, "drelu", threads) for c in copies],
            [backend(name).Matrix(c.gates, args.hidden, args.quant, threads) for c in copies],
        )
    runs: dict[str, tuple[str, Callable[[], object]]] = {}
    sizes: dict[str, int] = {}
    for isa in args.isa.split(","):
        ffns, matrices = layers["torch" if isa == "torch" else "cpu"]
        if isa != "torch":
            _core.set_isa(isa)
        for mode in ("dense", "exact"):
            y, _ = ffns[0].forward(x, x, mode=mode)
            error = float((y - truth).norm() / truth.norm())
            assert error < RELATIVE_RMS, f"{isa}, {mode}: relative RMS {error:g}"
            key = f"{isa} {mode}"
            runs[key] = (
                isa,
                lambda ffns=ffns, mode=mode: [f.forward(x, x, mode=mode) for f in ffns],
            )
            sizes[key] = moved[mode] * args.copies
        runs[f"{isa} matmul"] = isa, lambda matrices=matrices: [m.matmul(x) for m in matrices]
        sizes[f"{isa} matmul"] = stored.gates.size * args.copies
    seconds: dict[str, list[float]] = {key: [] for key in runs}
    memory, bandwidths = Memory(threads), []
    for _ in range(args.rounds):
        bandwidths.append(memory.read_speed())
        for key, (isa, run) in runs.items():
            if isa != "torch":
                _core.set_isa(isa)
            began = time.perf_counter()
            run()
            seconds[key].append(time.perf_counter() - began)

    ceiling = Spread.of(bandwidths)
    print(f"{machine()}, {threads} threads, load {os.getloadavg()[0]:.1f}")
    print(
        f"hidden {args.hidden}, {args.neurons} neurons, {args.quant}, {args.copies} copies, "
        f"{args.tokens} tokens"
    )
    print(
        f"gate > 0: {gate / args.neurons:.1%}, active: {active / args.neurons:.1%}; "
        f"read bandwidth {ceiling} GB/s"
    )
    result = {
        "machine": machine(),
        "threads": threads,
        "bandwidth_GBps": ceiling.median,
        **vars(args),
    }
    for key, times in seconds.items():
        layer = Spread.of([t / args.copies * 1e6 for t in times])  # µs
        packed = sizes[key] / args.copies
        speed = packed / layer.median / 1e3
        print(
            f"  {key:14} {layer} µs/layer {packed / 1e6:8.2f} MB "
            f"{speed:6.2f} GB/s {speed / ceiling.median:6.1%} of the ceiling"
        )
        result[key] = {"us_per_layer": layer.median, "GBps": speed}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
