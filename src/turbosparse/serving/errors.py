"""The errors that a client gets, in the form of the OpenAI API."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """What becomes ``{"error": {...}}`` with an HTTP status.

    Args:
        status: HTTP status; of an answer that has begun it is only part of the message's type.
        message: what is wrong, which value, and what to do.
        param: the parameter of the request that is wrong.
        code: a word for programs.
        retry_after: seconds after which another try may succeed.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}

    @property
    def body(self) -> dict[str, Any]:
        kind = _KINDS.get(self.status, "invalid_request_error")
        kind = "server_error" if self.status >= 500 else kind
        return {
            "error": {
                "message": self.message, "type": kind, "param": self.param, "code": self.code,
            }
        }  # fmt: skip


_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
