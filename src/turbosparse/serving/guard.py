"""What stands before the routes: keys, sizes, host names, and headers of every answer."""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from turbosparse.serving.errors import ApiError

MAX_BODY = 8 << 20  # bytes
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_KEYED = re.compile(r"/(v1/|tokenize|detokenize|metrics)")  # health and page have no secrets
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data:; base-uri 'none'; frame-ancestors 'none'; "
        "form-action 'none'"
    ),
    "Cache-Control": "no-store",
}


class Guard:
    """An ASGI application around another.

    Args:
        app: the routes.
        key: that requests must bring, as ``Authorization: Bearer KEY``.
        hosts: the names under which the server may be called; any where there are none. It keeps
            the pages of others from reaching a local server under a name of their own.
    """

    def __init__(self, app: ASGIApp, key: str | None = None, hosts: Iterable[str] = ()):
        self._app, self._key, self._hosts = app, key, frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        size = 0

        async def receive_some() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > MAX_BODY:
                raise HTTPException(413, _too_large().message)
            return message

        async def send_more(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        error = self._refusal(scope["path"], scope["method"], Headers(scope=scope))
        if error is None:
            await self._app(scope, receive_some, send_more)
        else:
            answer = JSONResponse(error.body, error.status, headers=error.headers)
            await answer(scope, receive, send_more)

    def _refusal(self, path: str, method: str, headers: Headers) -> ApiError | None:
        host = re.sub(r":\d*$", "", headers.get("host", "")).strip("[]").lower()
        if self._hosts and host not in self._hosts:
            return ApiError(
                403, f"host {host!r:.100} is not served; bind to an address, or give --api-key"
            )
        if self._key and method != "OPTIONS" and _KEYED.match(path):
            given = headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), self._key.encode()):
                return ApiError(
                    401, "the API key is missing or wrong; send Authorization: Bearer KEY",
                    code="invalid_api_key",
                )  # fmt: skip
        length = headers.get("content-length", "0")
        return _too_large() if not length.isdecimal() or int(length) > MAX_BODY else None


def _too_large() -> ApiError:
    return ApiError(413, f"the body is larger than {MAX_BODY} bytes", code="body_too_large")
