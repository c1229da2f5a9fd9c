"""llama.cpp in a process of its own; see `peer_process`.

python -m turbosparse.benchmark.llama_cpp_process MODEL THREADS CONTEXT STRIDE BATCH
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path

from turbosparse.base.machine import memory_available
from turbosparse.benchmark.peer_process import answer


def engine(
    model: str, threads: int, context: int, stride: int, batch: int
) -> Callable[[int, int], Iterator[None]]:
    import llama_cpp

    if Path(model).stat().st_size > memory_available():
        defaults = llama_cpp.llama_model_default_params()
        defaults.use_extra_bufts = False  # else it copies the weights into memory, to order them
        llama_cpp.llama_cpp.llama_model_default_params = lambda: defaults
    llama = llama_cpp.Llama(
        model,
        n_ctx=context,
        n_batch=batch,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )

    steps = count()

    def run(prompt: int, decode: int) -> Iterator[None]:
        vocabulary = range(llama.n_vocab())
        tokens = random.choices(vocabulary, k=prompt + decode)
        if stride:
            tokens = [next(steps) * stride % len(vocabulary) for _ in tokens]
        llama.reset()
        for at in range(0, prompt, batch):
            llama.eval(tokens[at : min(at + batch, prompt)])
        yield
        for token in tokens[prompt:]:
            llama.eval([token])

    return run


if __name__ == "__main__":
    answer(partial(engine, sys.argv[1], *map(int, sys.argv[2:])))
