"""Servers for tests: in a thread of this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from turbosparse.serving.app import Server, create_app
from turbosparse.serving.models import Models
from turbosparse.serving.scheduler import Scheduler


class Running:
    """A server and its address."""

    def __init__(self, server: Server, address: str):
        self.server, self.address = server, address

    def slow_down(self, seconds: float) -> None:
        """Every pass of the first model takes so much longer."""
        with self.server.models.using(None) as served:
            step = served.engine.decoder.step

            def slow(*given: Any, **more: Any) -> Any:
                time.sleep(seconds)
                return step(*given, **more)

            served.engine.decoder.step = slow

    def count(self, name: str, **labels: str) -> float:
        """A figure of the metrics."""
        found = self.server.scheduler.metrics.registry.get_sample_value(
            f"turbosparse_{name}", labels
        )
        return found or 0.0


@contextmanager
def serving(
    *folders: Path,
    key: str | None = None,
    seconds: float = 60,
    memory: int | None = None,
    kv_bytes: int | None = None,
    **settings: Any,
) -> Iterator[Running]:
    scheduler = Scheduler(**settings)
    models = Models(folders, memory, threads=1, kv_bytes=kv_bytes)
    server = Server(models, scheduler, seconds)
    app = create_app(server, key=key, hosts=("127.0.0.1",))
    listener = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=listener.run)
    thread.start()
    while not listener.started:
        time.sleep(0.01)
    port = listener.servers[0].sockets[0].getsockname()[1]
    try:
        yield Running(server, f"http://127.0.0.1:{port}")
    finally:
        listener.should_exit = True
        scheduler.close(0)
        scheduler.join()
        thread.join()
