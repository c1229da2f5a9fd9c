"""What a peer's process does: the other end of `peers.Peer`.

Reads requests from standard input, one JSON list each: the tokens of a prompt and how many to
decode. Answers with the seconds that each of the two took.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator


def answer(engine: Callable[[], Callable[[int, int], Iterator[None]]]) -> None:
    """Open an engine and answer until the input ends.

    `engine` returns what reads a prompt of so many tokens, yields, and decodes so many more.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the library prints
    run = engine()
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        work = run(*json.loads(line))
        times = [time.perf_counter()]
        for _ in work:
            times.append(time.perf_counter())
        times.append(time.perf_counter())
        print(json.dumps([times[1] - times[0], times[2] - times[1]]), file=answers, flush=True)
