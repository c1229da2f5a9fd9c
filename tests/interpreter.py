"""Triton's interpreter, made fast enough for tests."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from triton.runtime import interpreter

from turbosparse.ops import gpu, gpu_attention

AS_ON_A_CARD = gpu.ROWS, gpu.DOWN_ROWS, gpu_attention.SPLITS


def set_sizes(rows: int, down_rows: int, splits: int) -> None:
    """Of the programs of a kernel."""
    gpu.ROWS, gpu.DOWN_ROWS, gpu_attention.SPLITS = rows, down_rows, splits


def make_fast() -> None:
    """Change `triton.language` once, not at each call of a function; look for no overflow.

    And run few programs on many rows: what takes time is each operation of a program.
    """
    if not os.environ.get("TRITON_INTERPRET"):
        return
    set_sizes(128, 128, 2)
    patch, done = interpreter._patch_lang, {}

    def once(function: Any) -> Any:
        place = id(function.__globals__)
        if place not in done:
            done[place] = patch(function)  # kept, and never undone
        return interpreter._LangPatchScope()

    interpreter._patch_lang = once
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
