"""Time the feed-forward and a matrix product at a decode step, against the measured bandwidth.

    python benchmarks/ops.py --hidden 4096 --neurons 14336 --quant q4 --copies 3 --isa avx512,avx2

Weights are random; a constant direction in the input that the gate rows lean against sets the
sparsity, so that the activity is computed, not faked. Several copies are cycled, more than fits in
the caches. Rounds are interleaved.

    python benchmarks/ops.py --base main --quant q4

compares this working tree with another commit: each runs its own core and its own ops.py, in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from base import compare

from turbosparse import _core
from turbosparse.base.machine import threads_to_use
from turbosparse.benchmark.harness import Memory, Spread, machine
from turbosparse.ops import backend
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
    base = parser.add_argument_group("comparing with another commit")
    base.add_argument("--base", metavar="REV", help="a commit; the other flags are for both")
    base.add_argument("--pairs", type=int, default=5, help="runs of each of the two")
    args = parser.parse_args()
    if args.base:
        print(compare("ops.py", args.base, flags_for_both(parser, args), args.pairs))
        return
    del args.base, args.pairs
    threads = threads_to_use(args.threads)
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
