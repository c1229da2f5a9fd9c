"""What a client gets: the JSON of the OpenAI API, whole or in chunks.

The additional field ``turbosparse`` says how sparse the pass of a token was; clients that do not
know it ignore it.
"""

from __future__ import annotations

import itertools
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np

from turbosparse.engine.engine import Engine
from turbosparse.engine.text import Tokenizer
from turbosparse.hf.activations import ACTIVATIONS
from turbosparse.hf.count import experts_in_use
from turbosparse.serving.models import Served
from turbosparse.serving.requests import ChatRequest, CompletionRequest
from turbosparse.serving.scheduler import Piece
from turbosparse.serving.tools import ToolText

Json = dict[str, Any]


class Reply(ABC):
    """Of one request.

    Args:
        served: the model.
        prompts: tokens of each prompt.
        texts: how many texts are asked for, of all prompts together.
    """

    def __init__(self, served: Served, prompts: list[list[int]], texts: int):
        self.served, self.texts = served, texts
        self._prompts = prompts
        self._pieces: list[list[Piece]] = [[] for _ in range(texts)]

    @abstractmethod
    def first(self) -> Iterator[Json]:
        """The events before the first token."""

    @abstractmethod
    def chunk(self, piece: Piece) -> Json:
        """The event of a token."""

    @abstractmethod
    def last(self) -> Iterator[Json]:
        """The events after the last token."""

    @abstractmethod
    def whole(self) -> Json:
        """The answer in one piece."""

    def add(self, piece: Piece) -> None:
        self._pieces[piece.index].append(piece)

    def _figures(self) -> Json:
        return figures(self.served.engine, [piece for pieces in self._pieces for piece in pieces])

    def _counts(self) -> tuple[int, int, int]:
        """Tokens of the prompts, of them those that were not read, and of the texts."""
        each = self.texts // len(self._prompts)  # the texts of a prompt follow each other
        cached = sum(pieces[0].cached for pieces in self._pieces[::each] if pieces)
        return sum(map(len, self._prompts)), cached, sum(map(len, self._pieces))


class ChoicesReply(Reply):
    """Of chats and completions: a choice for each text.

    Args:
        served, prompts, texts: as `Reply`.
        usage: whether a stream ends with the counts of tokens.
    """

    prefix: str
    kind: str
    chunk_kind: str

    def __init__(self, served: Served, prompts: list[list[int]], texts: int, usage: bool):
        super().__init__(served, prompts, texts)
        self._tells_usage = usage
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": served.name,
        }

    @abstractmethod
    def begin(self, index: int) -> Json:
        """The first chunk of a text: its choice."""

    @abstractmethod
    def step(self, piece: Piece) -> Json:
        """A token's choice."""

    @abstractmethod
    def choice(self, index: int, pieces: list[Piece]) -> Json:
        """A whole text's choice."""

    def first(self) -> Iterator[Json]:
        for index in range(self.texts):
            yield self._chunk([self.begin(index)])

    def chunk(self, piece: Piece) -> Json:
        self.add(piece)
        return self._chunk([self.step(piece)]) | {
            "turbosparse": figures(self.served.engine, [piece])
        }

    def last(self) -> Iterator[Json]:
        if self._tells_usage:
            yield self._chunk([]) | {"usage": self._usage()}

    def whole(self) -> Json:
        choices = [self.choice(index, pieces) for index, pieces in enumerate(self._pieces)]
        return self._head | {
            "object": self.kind,
            "choices": choices,
            "usage": self._usage(),
            "turbosparse": self._figures(),
        }

    def _chunk(self, choices: list[Json]) -> Json:
        return self._head | {"object": self.chunk_kind, "choices": choices}

    def _usage(self) -> Json:
        prompt, cached, completion = self._counts()
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


class ChatReply(ChoicesReply):
    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, served: Served, request: ChatRequest, prompts: list[list[int]]):
        super().__init__(served, prompts, request.n, request.usage)
        names = {tool.function.name for tool in request.tools}
        self._logprobs = request.logprobs
        self._tools = (
            [ToolText(names, request.parallel_tool_calls) for _ in range(request.n)]
            if names and request.tool_choice != "none"
            else []
        )

    def begin(self, index: int) -> Json:
        return _choice(index, None, None, delta={"role": "assistant", "content": ""})

    def step(self, piece: Piece) -> Json:
        text, calls = self._split(piece)
        delta: Json = {"content": text} if text or not calls else {}
        if calls:
            delta["tool_calls"] = [{"index": at} | call for at, call in enumerate(calls)]
        ended = "tool_calls" if calls else finish(piece)
        return _choice(piece.index, self._scores([piece]), ended, delta=delta)

    def choice(self, index: int, pieces: list[Piece]) -> Json:
        split = [self._split(piece) for piece in pieces]
        text, calls = "".join(text for text, _ in split), split[-1][1]
        message: Json = {"role": "assistant", "content": text or (None if calls else "")}
        if calls:
            message["tool_calls"] = calls
        ended = "tool_calls" if calls else finish(pieces[-1])
        return _choice(index, self._scores(pieces), ended, message=message)

    def _split(self, piece: Piece) -> tuple[str, list[Json]]:
        if not self._tools:
            return piece.token.text, []
        tools = self._tools[piece.index]
        text = tools.step(piece.token.text)
        if piece.token.finish is None:
            return text, []
        rest, calls = tools.finish()
        return text + rest, calls

    def _scores(self, pieces: list[Piece]) -> Json | None:
        if not self._logprobs:
            return None
        tokenizer = self.served.tokenizer
        return {
            "content": [
                score(tokenizer, piece.token.id, piece.logprob)
                | {"top_logprobs": [score(tokenizer, *one) for one in piece.top]}
                for piece in pieces
            ],
            "refusal": None,
        }


class CompletionReply(ChoicesReply):
    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, served: Served, request: CompletionRequest, prompts: list[list[int]]):
        super().__init__(served, prompts, request.n * len(prompts), request.usage)
        self._logprobs = request.logprobs is not None
        self._echo = [""] * len(prompts)
        if request.echo:
            self._echo = [
                given if isinstance(given, str) else served.tokenizer.decode(given)
                for given in request.prompts
            ]
        self._each = request.n
        self._at = [0] * self.texts  # where the next token's text begins

    def begin(self, index: int) -> Json:
        return _choice(index, None, None, text=self._echo[index // self._each])

    def step(self, piece: Piece) -> Json:
        scores = self._scores([piece])
        return _choice(piece.index, scores, finish(piece), text=piece.token.text)

    def choice(self, index: int, pieces: list[Piece]) -> Json:
        text = self._echo[index // self._each] + "".join(piece.token.text for piece in pieces)
        return _choice(index, self._scores(pieces), finish(pieces[-1]), text=text)

    def _scores(self, pieces: list[Piece]) -> Json | None:
        if not self._logprobs:
            return None
        tokenizer, index = self.served.tokenizer, pieces[0].index
        texts = [spell(tokenizer, piece.token.id) for piece in pieces]
        starts = list(itertools.accumulate(map(len, texts), initial=self._at[index]))
        self._at[index] = starts[-1]
        return {
            "tokens": texts,
            "token_logprobs": [piece.logprob for piece in pieces],
            "top_logprobs": [
                {spell(tokenizer, one): value for one, value in piece.top} for piece in pieces
            ],
            "text_offset": starts[:-1],
        }


def _choice(index: int, scores: Json | None, finish: str | None, **content: Any) -> Json:
    return {"index": index, **content, "logprobs": scores, "finish_reason": finish}


def finish(piece: Piece) -> str | None:
    return {None: None, "stop": "stop"}.get(piece.token.finish, "length")


def spell(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.token_bytes(token).decode("utf-8", "replace")


def score(tokenizer: Tokenizer, token: int, logprob: float) -> Json:
    return {
        "token": spell(tokenizer, token),
        "logprob": logprob,
        "bytes": list(tokenizer.token_bytes(token)),
    }


def figures(engine: Engine, pieces: list[Piece]) -> Json:
    """How sparse the passes of these tokens were; of a prompt's pass, the mean over its tokens.

    A row is a gate, an up or a down row of a neuron, in the experts that are in use. Rows are
    counted for each token, mean over the tokens.
    """
    config = engine.config
    layers = np.mean([piece.layers for piece in pieces], axis=0)  # [layers, 3]
    gated = ACTIVATIONS[engine.packed.activation].gated
    columns = [0, 1, 2] if gated else [0, 2]  # candidates' first rows, then ups, then downs
    experts = experts_in_use(config)
    rows = config.intermediate_size * experts * len(layers) * len(columns)
    share = 1.0 if engine.mode == "dense" else float(layers[:, columns].mean())
    return {
        "active": round(float(layers[:, 2].mean()), 5),
        "candidates": round(float(layers[:, 0].mean()), 5),
        "layers": [round(value, 4) for value in layers[:, 2].tolist()],
        "tokens_per_second": round(pieces[-1].tokens_per_second, 2),
        "rows_read": round(rows * share),
        "rows_skipped": rows - round(rows * share),
        "experts": {"used": experts, "of": getattr(config, "num_local_experts", 1) or 1},
    }
