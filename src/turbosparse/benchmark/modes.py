"""Tokens/s of a packed model with a predictor: dense, exact and predicted, in turn."""

from __future__ import annotations

import time
from pathlib import Path
from typing import get_args

from turbosparse.benchmark.harness import Spread
from turbosparse.engine.engine import Engine
from turbosparse.ops import Mode

_PROMPT = 16  # tokens of the text that are read before the clock starts
_TOKENS = 64  # that are decoded at most


def modes_in_turn(
    folder: Path, text: list[int], *, rounds: int, threads: int | None = None
) -> dict[str, Spread]:
    """Decode a text in each mode, and again; what it says is given, so that all do the same work.

    Args:
        folder: packed, with a predictor.
        text: token ids, more than the first 16.
        rounds: how often.
        threads: by default all processors of this process.
    """
    engine = Engine(folder, mode="predicted", threads=threads)
    speeds: dict[Mode, list[float]] = {mode: [] for mode in get_args(Mode)}
    for number in range(rounds + 1):
        for mode, found in speeds.items():
            cache = engine.decoder.new_cache(engine.context)
            engine.decoder.step([text[:_PROMPT]], [cache], mode=mode)
            rest = text[_PROMPT : _PROMPT + _TOKENS]
            began = time.perf_counter()
            for token in rest:
                engine.decoder.step([[token]], [cache], mode=mode)
            if number:  # the first round maps the weights
                found.append(len(rest) / (time.perf_counter() - began))
    return {mode: Spread.of(found) for mode, found in speeds.items()}
