"""The life of a serving process: it listens until a signal, and ends in bounded time."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from fastapi import FastAPI

from turbosparse.base.progress import note
from turbosparse.serving.scheduler import Scheduler


def run(app: FastAPI, scheduler: Scheduler, *, host: str, port: int, grace: float) -> None:
    """Serve until SIGINT or SIGTERM; requests then have `grace` seconds to end."""
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
        timeout_keep_alive=75,  # longer than clients keep them: a request meets no closing one
        timeout_graceful_shutdown=int(grace) + 5,
    )
    _Process(config, scheduler, grace).run()
    scheduler.close(0)
    scheduler.join(5)


class _Process(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, scheduler: Scheduler, grace: float):
        super().__init__(config)
        self._scheduler, self._grace = scheduler, grace

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but a signal is how a server ends: it is not raised again afterwards."""
        numbers = signal.SIGINT, signal.SIGTERM
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._scheduler.close(self._grace)
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            host = f"[{host}]" if ":" in host else host
            note(f"listening at http://{host}:{port}")
