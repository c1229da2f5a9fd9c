"""A stand-in for the hub: the few requests that its client makes to publish a model."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


class Hub(ThreadingHTTPServer):
    """`repositories` are ``{name: {path: bytes}}``; the token is ``right``."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Requests)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.created: list[dict[str, Any]] = []
        self.fails: dict[str, int] = {}  # part of a path → the status that it answers


class _Requests(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        name, _, path = self.path.lstrip("/").partition("/resolve/main/")
        if self.path == "/api/whoami-v2":
            self.answer(200, {"name": "me", "type": "user"})
        elif path in (held := self.server.repositories.get(name, {})):
            self.answer(200, held[path])
        else:
            self.answer(404, {})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.create(json.loads(body))
        elif self.path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif self.path.endswith("/preupload/main"):
            files = [{"path": file["path"]} for file in json.loads(body)["files"]]
            how = {"uploadMode": "regular", "shouldIgnore": False}
            self.answer(200, {"files": [file | how for file in files]})
        else:
            self.commit(self.path.removeprefix("/api/models/").partition("/commit/")[0], body)

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.server.url}/{name}"}
        if name in self.server.repositories:
            self.answer(409, url | {"error": "You already created this model repo"})
            return
        self.server.repositories[name] = {}
        self.server.created.append(asked)
        self.answer(200, url)

    def commit(self, name: str, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.server.repositories[name][line["value"]["path"]] = content
        url = f"{self.server.url}/{name}/commit/1"
        self.answer(200, {"commitUrl": url, "commitOid": "1"})

    def answer(self, status: int, body: Any) -> None:
        if self.headers["Authorization"] not in ("Bearer right", None):
            status, body = 401, {"error": "Invalid token"}
        for part, failure in self.server.fails.items():
            if part in self.path:
                status, body = failure, {"error": "not today"}
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", '"1"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def running() -> Iterator[Hub]:
    with Hub() as hub:
        thread = Thread(target=hub.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
