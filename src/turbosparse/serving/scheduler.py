"""Continuous batching: one thread that steps all engines, while texts join and leave.

Between two passes the thread drops texts that were cancelled or are late, admits waiting ones and
decides how much of each prompt is read. Everything that touches a sequence happens on it.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turbosparse.base.errors import TurboSparseError
from turbosparse.engine.cost import CHUNK
from turbosparse.engine.engine import Step
from turbosparse.engine.generation import Ends, Text, Token
from turbosparse.engine.sampling import Logits, Sampler
from turbosparse.serving.errors import ApiError
from turbosparse.serving.metrics import Metrics
from turbosparse.serving.models import Served

_PAUSE = 0.2  # seconds that reading prompts may hold up the other texts of a batch
_SMALLEST_READ = 32  # tokens
_log = logging.getLogger("turbosparse.serve")


@dataclass(frozen=True)
class Piece:
    """One token of one text of a request."""

    index: int  # of the text
    token: Token
    layers: NDArray[np.float64]  # of its `engine.Step`, whose logits must not live as long
    tokens_per_second: float  # of this text, since its first token
    cached: int  # tokens of the prompt that were not read
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()  # the likeliest tokens and their log-probabilities


@dataclass(eq=False)
class Choice:
    """One text that a request asks for."""

    index: int
    prompt: list[int]
    sampler: Sampler
    ends: Ends
    leader: Choice | None = None  # has the same prompt and reads it first
    number: int = 0  # in order of arrival
    request: Request = field(init=False)
    text: Text | None = None
    cached: int = 0
    count: int = 0
    first_at: float = 0.0
    finished: bool = False

    @property
    def reading(self) -> bool:
        return self.count == 0

    @property
    def pending(self) -> int:
        assert self.text is not None
        return len(self.text.sequence.pending)

    @property
    def positions(self) -> int:
        return len(self.text.sequence.tokens if self.text else self.prompt)

    @property
    def ready(self) -> bool:
        return self.leader is None or self.leader.finished or not self.leader.reading


@dataclass(eq=False)
class Request:
    """Some texts of one model for one client.

    `emit` gets every Piece, or the ApiError that ends the request; it is called on the engine's
    thread and must not block.
    """

    served: Served
    choices: list[Choice]
    emit: Callable[[Piece | ApiError], None]
    client: str = ""
    seconds: float = 600.0  # within which it must end
    logprobs: int | None = None  # how many likeliest tokens to tell, besides the one chosen
    cancelled: bool = False
    ended: bool = False
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        for choice in self.choices:
            choice.request = self

    def cancel(self) -> None:
        """Stop it before the next pass; from any thread, at any time."""
        self.cancelled = True


class Scheduler:
    """Texts that run, texts that wait, and the thread that steps them.

    Args:
        parallel: texts decoded together.
        queue: texts that may wait besides; more are refused with status 429.
        metrics: what happens is counted there.
    """

    def __init__(self, *, parallel: int = 16, queue: int = 64, metrics: Metrics | None = None):
        self.parallel, self.queue = parallel, queue
        self.metrics = metrics or Metrics()
        self._changed = threading.Condition()
        self._waiting: list[Choice] = []
        self._running: list[Choice] = []
        self._numbers = itertools.count()
        self._turns: dict[str, int] = {}  # when each client that is here was served last
        self._read = _SMALLEST_READ  # tokens of prompts that the next pass reads
        self._closes_at: float | None = None
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ApiError: the server is closing, the queue is full, or a prompt is too long.
        """
        _check(request)
        with self._changed:
            if self._closes_at is not None:
                raise ApiError(503, "the server is shutting down", retry_after=10)
            texts, most = len(self._waiting) + len(self._running), self.parallel + self.queue
            if len(request.choices) > most:
                raise ApiError(400, f"a request may ask for {most} texts", param="n")
            if texts + len(request.choices) > most:
                raise ApiError(
                    429, f"{texts} texts run or wait, and no more fit; try later",
                    code="queue_full", retry_after=1 + len(self._waiting) // self.parallel,
                )  # fmt: skip
            for choice in request.choices:
                choice.number = next(self._numbers)
            self._waiting += request.choices
            self._changed.notify()

    def close(self, seconds: float) -> None:
        """Take no more requests and end those that are here, after `seconds` by an error."""
        with self._changed:
            self._closes_at = time.monotonic() + seconds
            self._changed.notify()

    def join(self, timeout: float | None = None) -> None:
        self._thread.join(timeout)

    @property
    def closing(self) -> bool:
        return self._closes_at is not None

    # -- the engine's thread -----------------------------------------------------------------------

    def _loop(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._running:
                    if self.closing:
                        return
                    self._changed.wait()
            self._drop()
            self._admit()
            self.metrics.waiting.set(len(self._waiting))
            self.metrics.running.set(len(self._running))
            batches: dict[Served, list[Choice]] = {}
            for choice in self._running:
                batches.setdefault(choice.request.served, []).append(choice)
            for served, batch in batches.items():
                try:
                    self._step(served, batch)
                except Exception as error:  # whatever it is, the others must go on
                    for choice in batch:
                        self._fail(choice.request, error)

    def _drop(self) -> None:
        """Let go of texts that have ended, are not wanted any more, or are late."""
        now = time.monotonic()
        for choice in [*self._running, *self._waiting]:
            request = choice.request
            if self._closes_at is not None and now > self._closes_at:
                self._fail(request, ApiError(503, "the server is shutting down"))
            elif now > request.began + request.seconds:
                late = f"no end within {request.seconds:g} s; ask for fewer tokens"
                self._fail(request, ApiError(504, late))
            elif request.cancelled:
                self._end(request, "cancelled")
            if request.ended or choice.finished:
                self._release(choice)

    def _release(self, choice: Choice) -> None:
        place = self._running if choice in self._running else self._waiting
        place.remove(choice)
        if choice.text:
            choice.text.sequence.sampler = Sampler()
            choice.request.served.prefixes.keep(choice.text.sequence)
            choice.text = None

    def _end(self, request: Request, how: str) -> None:
        if not request.ended:
            request.ended = True
            self.metrics.requests.labels(how).inc()

    def _fail(self, request: Request, error: Exception) -> None:
        if request.ended:
            return
        if isinstance(error, TurboSparseError):
            error = ApiError(500, str(error))
        elif not isinstance(error, ApiError):
            _log.error("a request failed", exc_info=error)
            error = ApiError(500, "an error inside the server; its log has more")
        self._end(request, "failed")
        request.emit(error)

    def _admit(self) -> None:
        """Start waiting texts: of the client that has fewest, or whose turn is the longest ago."""
        while len(self._running) < self.parallel:
            load = Counter(choice.request.client for choice in self._running)
            here = {choice.request.client for choice in [*self._running, *self._waiting]}
            self._turns = {who: turn for who, turn in self._turns.items() if who in here}
            ready = [choice for choice in self._waiting if choice.ready]
            if not ready:
                return
            choice = min(ready, key=lambda one: self._rank(one, load))
            if not self._fits(choice):
                return
            self._turns[choice.request.client] = next(self._numbers)
            self._waiting.remove(choice)
            self._running.append(choice)
            try:
                if not choice.text:
                    self._start(choice)
            except Exception as error:
                self._fail(choice.request, error)
                self._release(choice)

    def _rank(self, choice: Choice, load: Counter[str]) -> tuple[int, int, int]:
        client = choice.request.client
        return load[client], self._turns.get(client, -1), choice.number

    def _fits(self, choice: Choice) -> bool:
        """Whether the budget holds it beside those that run, should kept texts go."""
        served = choice.request.served
        running = [one for one in self._running if one.request.served is served]
        budget, size = served.engine.budget, served.engine.decoder.cache_bytes
        free = budget.limit - budget.used + served.prefixes.bytes
        return not running or size(choice.positions + 1, 0) <= free

    def _start(self, choice: Choice) -> None:
        served = choice.request.served
        running = [
            one.text.sequence for one in self._running if one.request.served is served and one.text
        ]
        sequence = served.prefixes.start(choice.prompt, running)
        sequence.sampler = choice.sampler
        choice.cached = sequence.length
        choice.text = Text(choice.index, sequence, served.tokenizer, choice.ends, served.draft)
        self.metrics.prompt_tokens.inc(len(choice.prompt))
        self.metrics.cached_tokens.inc(choice.cached)

    def _step(self, served: Served, batch: list[Choice]) -> None:
        counts = self._share_out(batch)
        self._make_room(served, batch, counts)
        if len(batch) == 1 and not batch[0].reading and batch[0].pending == 1:
            self._advance(batch[0])
            return
        sequences = [choice.text.sequence for choice in batch if choice.text]
        began = time.perf_counter()
        steps = served.engine.advance(sequences, [counts[choice] for choice in batch])
        seconds = time.perf_counter() - began
        if any(counts[choice] > 1 for choice in batch):
            fits = int(sum(counts.values()) * _PAUSE / seconds)
            self._read = max(_SMALLEST_READ, min(CHUNK, (self._read + fits) // 2))
        self.metrics.kept.set(served.prefixes.bytes)
        for choice, step in zip(batch, steps, strict=True):
            if not choice.pending and not choice.request.ended:
                try:
                    assert choice.text is not None
                    self._tell(choice, choice.text.accept(step, seconds), step)
                except Exception as error:
                    self._fail(choice.request, error)

    def _advance(self, choice: Choice) -> None:
        """A pass of the only text, which may be guessed ahead."""
        assert choice.text is not None
        for token, step in choice.text.advance():
            self._tell(choice, token, step)

    def _share_out(self, batch: list[Choice]) -> dict[Choice, int]:
        """Tokens that each text reads in the next pass: prompts share what the pause allows."""
        readers = sum(choice.pending > 1 for choice in batch)
        share = max(1, self._read // max(1, readers))
        return {choice: min(choice.pending, share) for choice in batch}

    def _make_room(self, served: Served, batch: list[Choice], counts: dict[Choice, int]) -> None:
        """Put the youngest texts back into the queue while the budget does not hold the pass."""
        size = served.engine.decoder.cache_bytes
        while True:
            needed = sum(
                size(choice.text.sequence.length + counts[choice], 0)
                - choice.text.sequence.reserved
                for choice in batch
                if choice.text
            )
            if served.prefixes.make_room(needed) or len(batch) == 1:
                return
            youngest = max(batch, key=lambda choice: choice.number)
            assert youngest.text is not None
            youngest.text.sequence.drop()
            batch.remove(youngest)
            del counts[youngest]
            self._running.remove(youngest)
            self._waiting.append(youngest)
            self.metrics.preempted.inc()

    def _tell(self, choice: Choice, token: Token, step: Step) -> None:
        """Tell the client of the token that followed a step."""
        request, now = choice.request, time.monotonic()
        if choice.reading:
            choice.first_at = now
            self.metrics.first_token.observe(now - request.began)
        choice.count += 1
        choice.finished = token.finish is not None
        self.metrics.generated_tokens.inc()
        self.metrics.active.set(step.active)
        rate = (choice.count - 1) / (now - choice.first_at) if choice.count > 1 else 0.0
        scores: dict[str, Any] = {}
        if request.logprobs is not None:
            scores = _logprobs(step.logits, token.id, request.logprobs)
        if all(one.finished for one in request.choices):
            self._end(request, "finished")
        request.emit(Piece(choice.index, token, step.layers, rate, choice.cached, **scores))


def _check(request: Request) -> None:
    for choice in request.choices:
        size, context = len(choice.prompt), request.served.context
        if not size:
            raise ApiError(400, "the prompt holds no token", param="prompt")
        if size >= context:
            raise ApiError(
                400,
                f"the prompt has {size} tokens; this server holds {context} of one text, and at "
                "least one must be left to generate: shorten the prompt",
                code="context_length_exceeded",
            )


def _logprobs(logits: Logits, token: int, count: int) -> dict[str, Any]:
    """Of the token that came, and of the likeliest ones."""
    scores = logits.astype(np.float64)
    scores -= scores.max()
    scores -= np.log(np.exp(scores).sum())
    likeliest = np.argsort(-scores, kind="stable")[:count].tolist()
    return {
        "logprob": float(scores[token]),
        "top": tuple((one, float(scores[one])) for one in likeliest),
    }
