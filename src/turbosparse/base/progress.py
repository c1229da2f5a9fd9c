"""Progress bars on standard error; quiet where nobody watches."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Iterable
from typing import TypeVar

Item = TypeVar("Item")


def track(items: Iterable[Item], what: str, *, total: int | None = None) -> Generator[Item]:
    """Yield `items` behind a progress bar that vanishes when they are done."""
    from rich.console import Console
    from rich.progress import track as rich_track

    console = Console(stderr=True)
    if console.is_terminal:
        items = rich_track(items, f"  {what}", total=total, console=console, transient=True)
    yield from items


def note(text: str) -> None:
    """Say something on standard error; of several processes the first one speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(f"turbosparse: {text}", file=sys.stderr)
