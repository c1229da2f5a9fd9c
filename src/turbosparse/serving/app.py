"""The routes of the server, in the form of the OpenAI API."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from turbosparse.base.errors import TurboSparseError
from turbosparse.engine.generation import Ends
from turbosparse.engine.sampling import Sampler
from turbosparse.serving.errors import ApiError
from turbosparse.serving.grammar import ANY_OBJECT, Follow
from turbosparse.serving.guard import Guard
from turbosparse.serving.models import Models, Served
from turbosparse.serving.replies import ChatReply, CompletionReply, Json, Reply
from turbosparse.serving.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Generate,
    Message,
    TokenizeRequest,
)
from turbosparse.serving.responses import ResponsesReply, ResponsesRequest
from turbosparse.serving.scheduler import Choice, Piece, Scheduler
from turbosparse.serving.scheduler import Request as Work
from turbosparse.serving.tools import forced_call

PAGE = Path(__file__).parent / "page"


class Job:
    """A request on its way: what the engine's thread says of it arrives in the event loop."""

    def __init__(self, server: Server, served: Served, reply: Reply, work: Work):
        self.reply, self._server, self._served, self._work = reply, server, served, work
        self._events: asyncio.Queue[Piece | ApiError] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def emit(event: Piece | ApiError) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        work.emit = emit

    async def pieces(self) -> AsyncIterator[Piece]:
        left = self.reply.texts
        while left:
            event = await self._events.get()
            if isinstance(event, ApiError):
                raise event
            left -= event.token.finish is not None
            yield event

    def close(self) -> None:
        self._work.cancel()
        self._server.models.release(self._served)

    async def whole(self) -> Json:
        async for piece in self.pieces():
            self.reply.add(piece)
        return self.reply.whole()

    async def stream(self) -> AsyncIterator[str]:
        try:
            for chunk in self.reply.first():
                yield _event(chunk)
            async for piece in self.pieces():
                yield _event(self.reply.chunk(piece))
            for chunk in self.reply.last():
                yield _event(chunk)
        except ApiError as error:
            yield _event(error.body)
        yield "data: [DONE]\n\n"


class Stream(StreamingResponse):
    """The chunks of a job, which ends with the connection."""

    def __init__(self, job: Job):
        super().__init__(job.stream(), media_type="text/event-stream")
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:  # the chunks themselves may never have been asked for
            self._job.close()


class Server:
    """Turns requests into work for the scheduler, and what comes back into answers."""

    def __init__(self, models: Models, scheduler: Scheduler, seconds: float):
        self.models, self.scheduler, self.seconds = models, scheduler, seconds

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        return await self._answer(body, request, self._chat)

    async def respond(self, body: ResponsesRequest, request: Request) -> Response:
        return await self._answer(body, request, self._response)

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        return await self._answer(body, request, self._completion)

    async def _answer(
        self, body: Any, request: Request, prepare: Callable[[Served, Any], tuple[Reply, Work]]
    ) -> Response:
        served = await asyncio.to_thread(self.models.acquire, body.model)
        try:
            reply, work = await asyncio.to_thread(prepare, served, body)
            work.client = body.user or (request.client.host if request.client else "")
            job = Job(self, served, reply, work)
            self.scheduler.submit(work)
        except BaseException:
            self.models.release(served)
            raise
        if body.stream:
            return Stream(job)
        try:
            return await _unless_gone(request, job.whole())
        finally:
            job.close()

    def _chat(self, served: Served, body: ChatRequest) -> tuple[Reply, Work]:
        tools = [tool.model_dump(exclude_none=True) for tool in body.tools]
        prompt = served.tokenizer.chat(
            [_plain(message) for message in body.messages],
            tools if body.tool_choice != "none" else None,
        )
        limit = body.max_completion_tokens or body.max_tokens
        work = self._work(served, body, [prompt], limit, chat=True)
        work.logprobs = body.top_logprobs if body.logprobs else None
        return ChatReply(served, body, [prompt]), work

    def _response(self, served: Served, body: ResponsesRequest) -> tuple[Reply, Work]:
        _, work = self._chat(served, body.chat)
        return ResponsesReply(served, body, [work.choices[0].prompt]), work

    def _completion(self, served: Served, body: CompletionRequest) -> tuple[Reply, Work]:
        prompts = [
            served.tokenizer.encode(prompt)
            if isinstance(prompt, str)
            else served.engine.check_tokens(prompt)
            for prompt in body.prompts
        ]
        work = self._work(served, body, prompts, body.max_tokens, chat=False)
        work.logprobs = body.logprobs
        return CompletionReply(served, body, prompts), work

    def _work(
        self,
        served: Served,
        body: Generate,
        prompts: list[list[int]],
        limit: int | None,
        *,
        chat: bool,
    ) -> Work:
        served.engine.check_tokens(body.logit_bias)
        stops = served.tokenizer.stop_ids(chat=chat)
        choices: list[Choice] = []
        for prompt in prompts:
            room = max(1, served.context - len(prompt))
            ends = Ends(min(limit or room, room), stops, body.stops)
            leader = None
            for _ in range(body.n):
                index = len(choices)
                sampler = Sampler(body.sampling(index), prompt, _grammar(served, body))
                choices.append(Choice(index, prompt, sampler, ends, leader))
                leader = leader or choices[-1]
        return Work(served, choices, emit=lambda _: None, seconds=self.seconds)

    def tokenize(self, body: TokenizeRequest) -> Json:
        with self.models.using(body.model) as served:
            tokens = served.tokenizer.encode(body.content, special=body.add_special)
            return {"tokens": tokens, "count": len(tokens)}

    def detokenize(self, body: DetokenizeRequest) -> Json:
        with self.models.using(body.model) as served:
            return {"content": served.tokenizer.decode(served.engine.check_tokens(body.tokens))}

    def list_models(self) -> Json:
        return {"object": "list", "data": [self.model(name) for name in self.models.folders]}

    def model(self, name: str) -> Json:
        self.models.check(name)
        about = {"object": "model", "created": self.models.created, "owned_by": "turbosparse"}
        return {"id": name, **about}

    def health(self) -> JSONResponse:
        closing = self.scheduler.closing
        status = "shutting down" if closing else "ok"
        return JSONResponse({"status": status}, 503 if closing else 200)

    def metrics(self) -> Response:
        return Response(
            generate_latest(self.scheduler.metrics.registry), media_type=CONTENT_TYPE_LATEST
        )


async def _to_page() -> RedirectResponse:
    return RedirectResponse("page/")


def create_app(
    server: Server,
    *,
    key: str | None = None,
    hosts: Sequence[str] = (),
    origins: Sequence[str] = (),
) -> FastAPI:
    """The application.

    Args:
        server: what the routes call.
        key: that clients must bring.
        hosts: the names under which it may be called; see `guard.Guard`.
        origins: web pages of others that may call it (CORS); none by default.
    """
    app = FastAPI(title="TurboSparse", openapi_url=None)
    app.post("/v1/chat/completions")(server.chat)
    app.post("/v1/completions")(server.complete)
    app.post("/v1/responses")(server.respond)
    app.get("/v1/models")(server.list_models)
    app.get("/v1/models/{name}")(server.model)
    app.post("/tokenize")(server.tokenize)
    app.post("/detokenize")(server.detokenize)
    app.get("/health")(server.health)
    app.get("/metrics")(server.metrics)
    app.get("/")(_to_page)
    app.mount("/page", StaticFiles(directory=PAGE, html=True))
    for kind in _ERRORS:
        app.add_exception_handler(kind, _on_error)
    app.add_middleware(Guard, key=key, hosts=hosts)
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    return app


def _plain(message: Message) -> Json:
    """A message as templates know it: text, and the arguments of calls as objects."""
    plain = message.model_dump(exclude_none=True)
    plain["role"] = "system" if message.role == "developer" else message.role
    if not isinstance(message.content, str):
        plain["content"] = "".join(part.text for part in message.content)
    for call in plain.get("tool_calls", []):
        try:
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        except ValueError:
            raise ApiError(
                400, "the arguments of a tool call are not JSON", param="messages"
            ) from None
    return plain


def _grammar(served: Served, body: Generate) -> Follow | None:
    if isinstance(body, ChatRequest) and body.forced:
        return served.grammars.of_lark(forced_call(served.tokenizer, body.forced), "tools")
    if body.grammar:
        return served.grammars.of_lark(body.grammar)
    form = body.response_format
    if form is None or form.type == "text":
        return None
    schema = form.json_schema.schema_ if form.json_schema else ANY_OBJECT
    return served.grammars.of_schema(schema)


async def _unless_gone(request: Request, answer: Any) -> Response:
    """The answer, or nothing once the client has hung up."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(answer), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return JSONResponse(tasks[0].result()) if tasks[0].done() else Response(status_code=499)
    finally:
        for task in tasks:
            task.cancel()


def _event(data: Json) -> str:
    name = f"event: {data['type']}\n" if "type" in data else ""  # of /v1/responses
    return f"{name}data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


# -- errors ----------------------------------------------------------------------------------------


_ERRORS = (ApiError, RequestValidationError, TurboSparseError, HTTPException, Exception)


async def _on_error(_: Request, error: Exception) -> Response:
    failed = _as_api_error(error)
    return JSONResponse(failed.body, failed.status, headers=failed.headers)


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, TurboSparseError):
        return ApiError(400, str(error))
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail))
    if not isinstance(error, RequestValidationError):
        return ApiError(500, "an error inside the server; see its log")
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is not valid JSON")
    place = [str(part) for part in first["loc"] if part != "body"]
    what = "is not a parameter here" if first["type"] == "extra_forbidden" else first["msg"]
    message = f"{'.'.join(place) or 'the body'}: {what}"
    return ApiError(400, message, param=place[0] if place else None)
