"""How much of a token one thread does alone, counted in the core: what bounds many threads.

    python benchmarks/alone.py --shape mistral-7b --layers 32 --threads 2,16,64

Counts the numbers and weights that the calling thread goes through outside of parallel sections,
and those of the thread that has most in them, in models of one and of two layers: layers repeat, so
the difference stands for every further one. There may be more threads than processors.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from turbosparse import _core
from turbosparse.benchmark.harness import machine
from turbosparse.engine.engine import Engine
from turbosparse.packed.synthetic import Wanted, make_synthetic

PROMPT, TOKENS = 16, 4


def count(folder: Path, mode: str, threads: int) -> np.ndarray:
    """Sections of a token, and the numbers of the calling thread alone and of the busiest."""
    engine: Any = Engine(folder, mode=mode)
    engine.decoder.threads = threads  # more than there are processors
    random = np.random.default_rng(0).integers(0, engine.config.vocab_size, PROMPT + TOKENS)
    with engine.sequence(random[:PROMPT].tolist()) as sequence:
        engine.step([sequence])
        found = []
        for token in random[PROMPT:].tolist():
            sequence.extend([token])
            found.append(_core.count_work(lambda: engine.step([sequence])))
    return np.mean(found, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shape", default="mistral-7b")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--predictor", default="rank=256")
    parser.add_argument("--threads", default="2,16,64")
    parser.add_argument("--folder", type=Path, help="keep the models here and use them again")
    args = parser.parse_args()
    print(f"{machine()}\n{args.shape}, {args.layers} layers, numbers of a token")
    result = {}
    with tempfile.TemporaryDirectory() as work:
        folders = [(args.folder or Path(work)) / str(layers) for layers in (1, 2)]
        for layers, folder in enumerate(folders, 1):
            wanted = Wanted(args.shape, 0.9, layers, args.predictor, "q8")
            if not folder.exists():
                make_synthetic(folder, wanted, quant="q4_0")
        for mode in ("dense", "exact", "predicted"):
            for threads in map(int, args.threads.split(",")):
                one, two = (count(folder, mode, threads) for folder in folders)
                sections, alone, most = one + (args.layers - 1) * (two - one)
                share = alone / (alone + most)
                result[f"{mode} {threads}"] = share
                print(
                    f"  {mode:9} {threads:3} threads: {sections:.0f} sections, alone {alone:.0f} "
                    f"of {alone + most:.0f}: {share:.2%}"
                )
    print(json.dumps({"machine": machine(), **vars(args), "alone": result}, default=str))


if __name__ == "__main__":
    main()
