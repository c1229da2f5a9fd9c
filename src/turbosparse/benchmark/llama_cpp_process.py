"""llama.cpp in a process of its own: the other end of `peers.LlamaCpp`.

    python -m turbosparse.benchmark.llama_cpp_process MODEL THREADS BATCH CONTEXT

Reads requests from standard input, one JSON list each: the tokens of a prompt and how many to
decode. Answers with the seconds that each of the two took.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from typing import Any


def main(model: str, threads: int, batch: int, context: int) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the library prints
    import llama_cpp

    llama = llama_cpp.Llama(
        model,
        n_ctx=context,
        n_batch=batch,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_timed(llama, batch, *json.loads(line))), file=answers, flush=True)


def _timed(llama: Any, batch: int, prompt: int, decode: int) -> list[float]:
    tokens = random.choices(range(llama.n_vocab()), k=prompt + decode)
    llama.reset()
    began = time.perf_counter()
    for at in range(0, prompt, batch):
        llama.eval(tokens[at : min(at + batch, prompt)])
    read = time.perf_counter()
    for token in tokens[prompt:]:
        llama.eval([token])
    return [read - began, time.perf_counter() - read]


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
