"""The packed folders that a server offers: opened when asked for, closed to save memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from turbosparse.base.errors import TurboSparseError
from turbosparse.base.folders import AnyPath, local_path
from turbosparse.engine.drafting import open_draft
from turbosparse.engine.engine import Engine
from turbosparse.engine.text import Tokenizer
from turbosparse.packed.format import Packed
from turbosparse.serving.errors import ApiError
from turbosparse.serving.grammar import Grammars
from turbosparse.serving.prefix import Prefixes


class Served:
    """An open model."""

    def __init__(self, name: str, folder: Path, settings: dict[str, Any], draft: str):
        self.name, self.folder = name, folder
        self.engine = Engine(folder, **settings)
        self.tokenizer = Tokenizer(folder)
        self.draft = open_draft(draft, self.engine, self.tokenizer)
        self.prefixes = Prefixes(self.engine)
        self.users, self.used_at = 0, 0.0
        self.context = self._context()

    @cached_property
    def grammars(self) -> Grammars:
        stops = self.tokenizer.stop_ids()
        if not stops:
            raise ApiError(400, f"{self.name} has no end token, which a grammar needs")
        return Grammars(self.folder, self.engine.config.vocab_size, stops)

    def _context(self) -> int:
        """Positions that one text may take: those of the model, as far as the budget holds them."""
        size, limit = self.engine.decoder.cache_bytes, self.engine.budget.limit
        context = self.engine.context
        while context and size(context, 0) > limit:
            context = min(context - 1, context * limit // size(context, 0))
        if context < 1:
            raise TurboSparseError(
                f"--kv-bytes {limit} holds no text of {self.folder}; give at least {size(1, 0)}"
            )
        return context


class Models:
    """All models of a server, by the names of their folders.

    Args:
        folders: packed folders; the first is the default.
        memory: bytes that the weights of open models may take together. The least recently used
            that nobody uses is closed before another opens. A model that is larger runs from disk:
            then all that its engine takes is within as much.
        draft: who guesses ahead for a text that is served alone; see `drafting.open_draft`.
        settings: of `engine.Engine`.

    Raises:
        TurboSparseError: a folder is not a packed one, or two have the same name.
    """

    def __init__(
        self,
        folders: Iterable[AnyPath],
        memory: int | None = None,
        *,
        draft: str = "auto",
        **settings: Any,
    ):
        self._memory, self._draft, self._settings = memory, draft, settings
        self._lock = threading.Lock()
        self.folders: dict[str, Path] = {}
        self._bytes: dict[str, int] = {}
        self._streams: dict[str, bool] = {}
        self._open: dict[str, Served] = {}
        for folder in (local_path(folder).resolve() for folder in folders):
            if folder.name in self.folders:
                raise TurboSparseError(
                    f"two models are called {folder.name}; rename one of the folders"
                )
            files = Packed(folder).header.files.values()
            self.folders[folder.name] = folder
            size = sum(file.bytes for file in files)
            self._bytes[folder.name] = size if memory is None else min(size, memory)
            self._streams[folder.name] = memory is not None and size > memory
        self.created = int(time.time())

    @property
    def open(self) -> list[Served]:
        return list(self._open.values())

    @contextmanager
    def using(self, name: str | None) -> Iterator[Served]:
        """The model of a request, opened where it is not; it stays open for as long."""
        served = self.acquire(name)
        try:
            yield served
        finally:
            self.release(served)

    def acquire(self, name: str | None) -> Served:
        """As `using`; to be followed by `release`.

        Raises:
            ApiError: there is no such model, or no memory for it now.
        """
        name = name or next(iter(self.folders))
        self.check(name)
        with self._lock:
            if name not in self._open:
                self._make_room(name)
                limit = {"memory": self._memory} if self._streams[name] else {}
                settings = self._settings | limit
                self._open[name] = Served(name, self.folders[name], settings, self._draft)
            served = self._open[name]
            served.users += 1
            return served

    def check(self, name: str) -> None:
        """Raises an ApiError where there is no such model."""
        if name not in self.folders:
            known = ", ".join(self.folders)
            raise ApiError(
                404, f"model {name!r:.200} does not exist; use {known}",
                param="model", code="model_not_found",
            )  # fmt: skip

    def release(self, served: Served) -> None:
        with self._lock:
            served.users -= 1
            served.used_at = time.monotonic()

    def _make_room(self, name: str) -> None:
        while self._memory and sum(self._bytes[n] for n in [*self._open, name]) > self._memory:
            idle = [served for served in self._open.values() if not served.users]
            if not idle:
                raise ApiError(503, "the models in use leave no memory; try later", retry_after=5)
            del self._open[min(idle, key=lambda served: served.used_at).name]
