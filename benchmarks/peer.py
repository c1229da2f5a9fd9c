"""Packed folders beside llama.cpp on a GGUF file: tokens/s in turn, and resident memory.

    python benchmarks/peer.py MODEL.gguf PACKED [PACKED …]

Each engine has a process of its own, so that the memory is its own: the pages of the model that it
has read, the cache and the program. Prints Markdown and ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from turbosparse.base.machine import threads_to_use
from turbosparse.benchmark.harness import Spread, machine

PROMPT = 8  # tokens
CONTEXT = 512


def resident() -> dict[str, float]:
    """Of this process, MB: all of it, and what no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    names = {"all": "VmRSS", "own": "RssAnon"}
    return {name: int(fields[key].split()[0]) / 1e3 for name, key in names.items()}


def ours(folder: str, threads: int) -> Any:
    from turbosparse.engine.engine import Engine

    engine = Engine(folder, threads=threads)

    def decode(tokens: int) -> float:
        with engine.sequence(list(range(100, 100 + PROMPT))) as sequence:
            engine.step([sequence])
            began = time.perf_counter()
            for token in range(200, 200 + tokens):
                sequence.extend([token])
                engine.step([sequence])
            return tokens / (time.perf_counter() - began)

    return decode


def theirs(file: str, threads: int) -> Any:
    import llama_cpp

    llama = llama_cpp.Llama(
        file, n_ctx=CONTEXT, n_threads=threads, n_threads_batch=threads, verbose=False
    )

    def decode(tokens: int) -> float:
        llama.reset()
        llama.eval(list(range(100, 100 + PROMPT)))
        began = time.perf_counter()
        for token in range(200, 200 + tokens):
            llama.eval([token])
        return tokens / (time.perf_counter() - began)

    return decode


def serve(pipe: Connection, model: str, threads: int) -> None:
    """In its own process: decode when told how many tokens; 0 asks for the memory, None ends."""
    decode = (theirs if model.endswith(".gguf") else ours)(model, threads)
    while (tokens := pipe.recv()) is not None:
        pipe.send(decode(tokens) if tokens else resident())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("models", nargs="+", help="GGUF files and packed folders")
    parser.add_argument("--tokens", type=int, default=64, help="of a round")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    pipes: dict[str, Connection] = {}
    spawn = multiprocessing.get_context("spawn")
    for model in args.models:
        pipes[model], other = spawn.Pipe()
        spawn.Process(target=serve, args=(other, model, threads_to_use(None)), daemon=True).start()
        other.close()

    def ask(model: str, tokens: int) -> Any:
        pipes[model].send(tokens)
        return pipes[model].recv()

    speeds: dict[str, list[float]] = {model: [] for model in pipes}
    for number in range(args.rounds + 1):
        for model, seen in speeds.items():
            speed = ask(model, args.tokens)
            if number:  # the first round maps the weights
                seen.append(speed)
    rows = {
        model: {"tokens_per_second": Spread.of(seen).__dict__, "resident_mb": ask(model, 0)}
        for model, seen in speeds.items()
    }
    for pipe in pipes.values():
        pipe.send(None)
    print("| | tokens/s | resident, MB | of it own, MB |\n|---|---|---|---|")
    for model, row in rows.items():
        memory = row["resident_mb"]
        name, speed = Path(model).name, Spread.of(speeds[model])
        print(f"| {name} | {speed} | {memory['all']:.0f} | {memory['own']:.0f} |")
    print(json.dumps({"machine": machine(), "tokens": args.tokens, "models": rows}))


if __name__ == "__main__":
    main()
