"""Packed folders beside llama.cpp on a GGUF file: tokens/s in turn, and resident memory.

    python benchmarks/peer.py MODEL.gguf PACKED [PACKED …]

Each engine has a process of its own, so that the memory is its own: the pages of the model that it
has read, the cache and the program. Prints Markdown and ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from turbosparse.base.machine import threads_to_use
from turbosparse.benchmark.harness import Spread, machine
from turbosparse.benchmark.peers import LlamaCpp
from turbosparse.engine.engine import Engine

PROMPT = 8  # tokens
CONTEXT = 512


class Ours:
    """A packed folder, decoded in a process of its own."""

    def __init__(self, folder: str, threads: int):
        spawn = multiprocessing.get_context("spawn")
        self._pipe, other = spawn.Pipe()
        child = spawn.Process(target=serve, args=(other, folder, threads), daemon=True)
        child.start()
        self.process = child.pid

    def decode(self, tokens: int) -> float:
        """Tokens/s of one sequence."""
        self._pipe.send(tokens)
        return float(self._pipe.recv())

    def close(self) -> None:
        self._pipe.send(None)


def serve(pipe: Connection, folder: str, threads: int) -> None:
    engine = Engine(folder, threads=threads)
    while (tokens := pipe.recv()) is not None:
        with engine.sequence(range(100, 100 + PROMPT)) as sequence:
            engine.step([sequence])
            began = time.perf_counter()
            for token in range(200, 200 + tokens):
                sequence.extend([token])
                engine.step([sequence])
            pipe.send(tokens / (time.perf_counter() - began))


def resident(process: int) -> tuple[float, float]:
    """MB of a process: all of it, and what no file backs."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    whole, own = (int(fields[name].split()[0]) / 1e3 for name in ("VmRSS", "RssAnon"))
    return whole, own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("models", nargs="+", help="GGUF files and packed folders")
    parser.add_argument("--tokens", type=int, default=64, help="of a round")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    threads = threads_to_use(None)
    engines: dict[str, Any] = {}
    for model in args.models:
        if model.endswith(".gguf"):
            peer = LlamaCpp(Path(model), threads=threads, prompt=PROMPT, context=CONTEXT)
            engines[Path(model).name] = peer
        else:
            engines[Path(model).name] = Ours(model, threads)
    speeds: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(args.rounds + 1):
        for name, engine in engines.items():
            speed = engine.decode(args.tokens)
            if number:  # the first round maps the weights
                speeds[name].append(speed)
    memory = {name: resident(engine.process) for name, engine in engines.items()}
    for engine in engines.values():
        engine.close()
    print(f"{machine()}, {threads} threads, load {os.getloadavg()[0]:.1f}\n")
    print("| | tokens/s | resident, MB | of it own, MB |\n|---|---|---|---|")
    for name, (whole, own) in memory.items():
        print(f"| {name} | {Spread.of(speeds[name])} | {whole:.0f} | {own:.0f} |")
    print(json.dumps({"machine": machine(), "tokens_per_second": speeds, "resident_mb": memory}))


if __name__ == "__main__":
    main()
