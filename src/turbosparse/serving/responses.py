"""``/v1/responses``: text in, text out. Nothing is kept between requests; no tools."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from turbosparse.serving.models import Served
from turbosparse.serving.replies import Json, Reply, figures, finish
from turbosparse.serving.requests import ChatRequest, Strict
from turbosparse.serving.scheduler import Piece


class Part(Strict):
    type: Literal["input_text", "output_text"]
    text: str
    annotations: list[Any] = Field(default_factory=list, max_length=0)
    logprobs: list[Any] = Field(default_factory=list, max_length=0)


class Item(Strict):
    """A message, as a client writes it or as an answer held it."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    id: str = ""
    status: Literal["completed", "incomplete"] = "completed"

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ResponsesRequest(Strict):
    model: str | None = None
    input: str | list[Item]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float = 1.0
    top_p: float = 1.0
    stream: bool = False
    store: Literal[False] = False
    user: str = ""

    @property
    def chat(self) -> ChatRequest:
        """What it asks, as a chat."""
        given = (
            [Item(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        )
        system = [Item(role="system", content=self.instructions)] if self.instructions else []
        return ChatRequest.model_validate(
            {
                "messages": [{"role": item.role, "content": item.text} for item in system + given],
                "max_completion_tokens": self.max_output_tokens,
                "temperature": self.temperature,
                "top_p": self.top_p,
            }
        )


class ResponsesReply(Reply):
    def __init__(self, served: Served, request: ResponsesRequest, prompts: list[list[int]]):
        super().__init__(served, prompts, 1)
        self._request, self._created = request, int(time.time())
        self._id, self._item = f"resp_{secrets.token_hex(12)}", f"msg_{secrets.token_hex(12)}"
        self._numbers = itertools.count()
        self._place = {"item_id": self._item, "output_index": 0, "content_index": 0}

    def first(self) -> Iterator[Json]:
        for name in ("created", "in_progress"):
            yield self._event(name, response=self._response("in_progress", []))
        item = self._message("in_progress", [])
        yield self._event("output_item.added", output_index=0, item=item)
        yield self._event("content_part.added", **self._place, part=_part(""))

    def chunk(self, piece: Piece) -> Json:
        self.add(piece)
        event = self._event("output_text.delta", **self._place, delta=piece.token.text, logprobs=[])
        return event | {"turbosparse": figures(self.served.engine, [piece])}

    def last(self) -> Iterator[Json]:
        whole = self.whole()
        (item,) = whole["output"]
        (part,) = item["content"]
        yield self._event("output_text.done", **self._place, text=part["text"], logprobs=[])
        yield self._event("content_part.done", **self._place, part=part)
        yield self._event("output_item.done", output_index=0, item=item)
        yield self._event(whole["status"], response=whole)

    def whole(self) -> Json:
        (pieces,) = self._pieces
        status = "completed" if finish(pieces[-1]) == "stop" else "incomplete"
        text = "".join(piece.token.text for piece in pieces)
        prompt, cached, made = self._counts()
        return self._response(status, [self._message(status, [_part(text)])]) | {
            "usage": {
                "input_tokens": prompt,
                "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
                "output_tokens": made,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": prompt + made,
            },
            "turbosparse": self._figures(),
        }

    def _event(self, name: str, **values: Any) -> Json:
        return {"type": f"response.{name}", "sequence_number": next(self._numbers), **values}

    def _message(self, status: str, content: list[Json]) -> Json:
        about = {"id": self._item, "type": "message", "role": "assistant"}
        return about | {"status": status, "content": content}

    def _response(self, status: str, output: list[Json]) -> Json:
        late = {"reason": "max_output_tokens"} if status == "incomplete" else None
        asked = self._request.model_dump(
            include={"instructions", "max_output_tokens", "temperature", "top_p", "store"}
        )
        return asked | {
            "id": self._id, "object": "response", "created_at": self._created, "status": status,
            "model": self.served.name, "output": output, "error": None, "incomplete_details": late,
            "tools": [], "tool_choice": "none", "parallel_tool_calls": False, "metadata": {},
        }  # fmt: skip


def _part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
