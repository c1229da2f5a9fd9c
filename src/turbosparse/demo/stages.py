"""What the demos share: stages that say what they do, and folders that are made once."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from turbosparse.base.errors import TurboSparseError
from turbosparse.base.folders import check_free, read_config, write_json


class Stages:
    """Says what the demo does and how long it took, on standard error and in a log."""

    def __init__(self, log: Path):
        self._log, self._number, self._began = log, 0, time.monotonic()
        self.say("turbosparse demo")

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        self._number += 1
        number, began = self._number, time.monotonic()
        self.say(f"{number}. {what} ...")
        yield
        self.say(f"{number}. done in {time.monotonic() - began:.1f} s")

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)
        with self._log.open("a", encoding="utf-8") as log:
            log.write(line + "\n")

    def say_what_next(self, folder: Path, question: str) -> None:
        """How to talk with a packed model that the demo made."""
        name = shlex.quote(str(folder))
        self.say("Now try:")
        self.say(f"turbosparse generate {name} --chat --prompt {shlex.quote(question)}")
        self.say(f"turbosparse chat {name}     # in the terminal")
        self.say(f"turbosparse serve {name}    # in the browser, at http://127.0.0.1:8080")


def open_demo(out: Path, settings: Any) -> None:
    """Make the demo's folder, or make sure that what is there is a demo of the same settings."""
    if find_spec("matplotlib") is None:
        raise TurboSparseError(
            "the demo ends with figures, for which matplotlib is needed: pip install matplotlib"
        )
    stored = out / "settings.json"
    if (out / "config.json").exists() or not stored.is_file():
        check_free(out)
        out.mkdir(parents=True, exist_ok=True)
        write_json(stored, asdict(settings))
    elif read_config(out, "settings.json") != asdict(settings):
        raise TurboSparseError(
            f"{out} holds a demo of other sizes or of another model; remove it or choose another "
            "--out"
        )


def once(path: Path, make: Callable[[Path], Any]) -> Path:
    """Make a file or folder unless an earlier run did."""
    if not path.exists():
        make(path)
    return path
