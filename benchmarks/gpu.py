"""Measure the gpu backend on a card: dense, exact and predicted decoding of a 7B shape.

    make bench-gpu

First the tests of the kernels run on the card, without the interpreter. Then, for f16 and q4, a
synthetic model with 90 % zeros and a predictor is made. Its modes decode in turn with a dense peer
of the same shape (torch.compile, bfloat16). Both lie on the card: take --layers where that is too
much. A table and one JSON file say how fast each was, the bytes read, bandwidth and clocks.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import silu

from turbosparse.benchmark.harness import Spread, machine
from turbosparse.engine.cost import bytes_per_step
from turbosparse.engine.engine import Engine, has_modes
from turbosparse.packed.synthetic import Wanted, make_synthetic

ROOT = Path(__file__).resolve().parents[1]
SAME = 1e-3  # relative RMS of exact mode's logits to those of dense mode
CARD = torch.device("cuda")
PROMPT = 16  # tokens before the clock starts


def card_state() -> str:
    """Name, driver, clocks and power, as nvidia-smi tells them."""
    fields = "name,driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def seconds(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - began


class Bandwidth:
    """GB/s of copying an array that is larger than the caches."""

    def __init__(self, size: int = 1 << 30):
        self.source = torch.ones(size // 4, device=CARD)
        self.target = torch.empty_like(self.source)

    def measure(self) -> float:
        self.target.copy_(self.source)
        took = seconds(lambda: [self.target.copy_(self.source) for _ in range(10)])
        return 10 * 2 * self.source.nbytes / took / 1e9


class Peer(torch.nn.Module):
    """The matrices of a dense model of the same shape, one after the other, without attention.

    What is left out makes it faster, not slower, than a whole decoder.
    """

    def __init__(self, config: Any):
        super().__init__()
        hidden, neurons = config.hidden_size, config.intermediate_size
        kv = config.num_key_value_heads * (hidden // config.num_attention_heads)
        shapes = [(hidden + 2 * kv, hidden), (hidden, hidden)]
        shapes += [(2 * neurons, hidden), (hidden, neurons)]
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleList(torch.nn.Linear(cols, rows, bias=False) for rows, cols in shapes)
            for _ in range(config.num_hidden_layers)
        )
        self.head = torch.nn.Linear(hidden, config.vocab_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = x.shape[-1]
        for qkv, o, gate_up, down in self.layers:
            x = x + o(qkv(x)[:, :hidden])
            gate, up = gate_up(x).chunk(2, -1)
            x = x + down(silu(gate) * up)
        return self.head(x)


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Figures of one packed folder, all modes in turn with the peer."""
    engine = Engine(folder, backend="gpu", mode="dense")
    decoder, config = engine.decoder, engine.config
    random, bandwidth = np.random.default_rng(0), Bandwidth()
    modes = has_modes(engine.packed, "auto")
    counts: dict[str, list[Any]] = {mode: [] for mode in modes}
    speeds: dict[str, list[float]] = {mode: [] for mode in [*modes, "peer"]}
    logits, bandwidths = {}, []

    def decode(mode: str, tokens: list[int]) -> None:
        cache = decoder.new_cache(PROMPT + len(tokens))
        decoder.step([tokens[:PROMPT]], [cache], mode=mode)
        took = 0.0
        for token in tokens[PROMPT:]:
            began = time.perf_counter()  # the step waits for its logits
            logits[mode], used = decoder.step([[token]], [cache], mode=mode)
            took += time.perf_counter() - began
            counts[mode].append(used)
        speeds[mode].append((len(tokens) - PROMPT) / took)

    with CARD, torch.inference_mode():
        peer = torch.compile(Peer(config).to(torch.bfloat16), mode="reduce-overhead")
        x = torch.randn(1, config.hidden_size, dtype=torch.bfloat16)
        for number in range(args.rounds + 1):  # the first compiles and captures
            tokens = random.integers(0, config.vocab_size, PROMPT + args.tokens).tolist()
            bandwidths.append(bandwidth.measure())
            for mode in modes:
                decode(mode, tokens)
            took = seconds(lambda: [peer(x) for _ in range(args.tokens)])
            speeds["peer"].append(args.tokens / took)
            if not number:
                found, truth = logits["exact"], logits["dense"]
                error = float(np.linalg.norm(found - truth) / np.linalg.norm(truth))
                assert error < SAME, f"exact mode is {error:g} away from dense mode"
                for kept in (*counts.values(), *speeds.values(), bandwidths):
                    kept.clear()
    near = Spread.of(bandwidths)
    result: dict[str, Any] = {
        "model": str(engine.packed.header.source),
        "quant": engine.packed.quant,
    }
    result["bandwidth_GBps"] = asdict(near)
    for mode in modes:
        engine.mode = mode
        parts = bytes_per_step(engine, np.stack(counts[mode]), PROMPT + args.tokens / 2)
        ceiling = near.median * 1e9 / sum(parts.values())
        speed = Spread.of(speeds[mode])
        result[mode] = {"tokens_per_second": asdict(speed), "bytes": parts, "ceiling": ceiling}
        print(f"  {mode:9} {speed} tokens/s, {speed.median / ceiling:.0%} of {ceiling:.1f}")
    result["peer"] = {"tokens_per_second": asdict(Spread.of(speeds["peer"]))}
    print(f"  peer      {Spread.of(speeds['peer'])} tokens/s (dense, bfloat16, torch.compile)")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shape", default="mistral-7b")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quants", default="f16,q4")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(
            "bench-gpu needs an NVIDIA GPU, and torch finds none; see whether nvidia-smi lists one "
            "and torch is built for CUDA"
        )
    command = [sys.executable, "-m", "pytest", "-q", "tests/test_gpu.py", "tests/test_hybrid.py"]
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        sys.exit("the kernels fail their tests on this card: nothing is measured")
    results: dict[str, Any] = {
        "machine": machine(),
        "card": card_state(),
        "torch": torch.__version__,
    }
    print(f"{results['machine']}; {results['card']}")
    wanted = Wanted(args.shape, 0.9, args.layers, "rank=256", "q8")
    for quant in args.quants.split(","):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model"
            make_synthetic(path, wanted, quant=quant)
            print(f"{wanted}, {quant}")
            results[quant] = measure(path, args)
    results["card_afterwards"] = card_state()
    name = re.sub(r"\W+", "-", torch.cuda.get_device_name()).lower()
    out = ROOT / "benchmarks" / "results" / f"{name}.json"
    out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
