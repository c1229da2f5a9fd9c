"""Progress on standard error: a bar on a terminal, now and then a line in a log."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Generator, Iterable
from typing import TypeVar

Item = TypeVar("Item")
EVERY = 30.0  # seconds between two lines


def track(items: Iterable[Item], what: str, *, total: int | None = None) -> Generator[Item]:
    """Yield `items` behind a progress bar that vanishes when they are done, or behind lines."""
    from rich.console import Console
    from rich.progress import track as rich_track

    console = Console(stderr=True)
    if console.is_terminal:
        yield from rich_track(items, f"  {what}", total=total, console=console, transient=True)
        return
    lines = Lines(what, total)
    for done, item in enumerate(items):
        lines.update(done)
        yield item


class Lines:
    """Progress for a log file: a line whenever `EVERY` seconds have gone by."""

    def __init__(self, what: str, total: int | None):
        self._what, self._of = what, "" if total is None else f" of {total}"
        self._last = time.monotonic()

    def update(self, done: int, text: str = "") -> None:
        if time.monotonic() - self._last >= EVERY:
            self._last = time.monotonic()
            note(f"{self._what}: {done}{self._of}  {text}".rstrip())


def note(text: str) -> None:
    """Say something on standard error; of several processes the first one speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(f"turbosparse: {text}", file=sys.stderr)
