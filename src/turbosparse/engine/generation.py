"""The one loop from prompts to text; everything that generates consumes it. Loads no torch."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

from turbosparse.base.errors import TurboSparseError
from turbosparse.engine.engine import Engine, Step
from turbosparse.engine.sampling import Sampler, Sampling
from turbosparse.engine.sequence import Cancelled, Sequence
from turbosparse.engine.text import Detokenizer, StopStrings, Tokenizer

Finish = Literal["stop", "length", "context", "cancelled"]


@dataclass(frozen=True)
class Token:
    """One generated token."""

    id: int
    text: str  # may be empty while a character, or what may be a stop string, is incomplete
    seconds: float  # of the forward pass that gave it; the first one's is the prompt's
    active: float  # share of active neurons in that pass
    candidates: float  # share that a predictor let through; 1 without
    finish: Finish | None = None


@dataclass(frozen=True)
class Ends:
    """Where a text ends."""

    max_tokens: int = 256
    ids: frozenset[int] = frozenset()  # the last Token is then one of them, with no text of its own
    strings: tuple[str, ...] = ()  # the text ends before one of them

    def __post_init__(self) -> None:
        if type(self.max_tokens) is not int or self.max_tokens < 1:
            raise TurboSparseError(
                f"max-tokens is {self.max_tokens!r}; it must be a whole number, 1 or more"
            )


class Text:
    """One text in the making."""

    def __init__(self, index: int, sequence: Sequence, tokenizer: Tokenizer, ends: Ends):
        self.index, self.sequence, self.ends = index, sequence, ends
        self.finished = False
        self._count = 0
        self._pieces = Detokenizer(tokenizer, sequence.tokens)
        self._stops = StopStrings(ends.strings)

    def accept(self, step: Step, seconds: float) -> Token:
        """Choose the token that follows a step."""
        token = self.sequence.sampler.choose(step.logits)
        self._count += 1
        finish: Finish | None = None
        piece, stopped = "", False
        if token in self.ends.ids:
            finish = "stop"
        else:
            piece, stopped = self._stops.step(self._pieces.step(token))
            if stopped:
                finish = "stop"
            elif self._count == self.ends.max_tokens:
                finish = "length"
            elif len(self.sequence.tokens) == self.sequence.engine.context:
                finish = "context"
        if finish and not stopped:
            rest, stopped = self._stops.step(self._pieces.finish())
            piece += rest + ("" if stopped else self._stops.finish())
        self.finished = finish is not None
        if len(self.sequence.tokens) < self.sequence.context:
            self.sequence.extend([token])
        return Token(token, piece, seconds, step.active, step.candidates, finish)

    def cancelled(self) -> Token:
        self.finished = True
        return Token(-1, self._stops.finish(), 0.0, 0.0, 1.0, "cancelled")


def stream_all(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Iterable[Iterable[int]],
    *,
    sampling: Sampling | None = None,
    ends: Ends | None = None,
) -> Iterator[tuple[int, Token]]:
    """Yield the tokens of several prompts, decoded together, as (prompt, token).

    Each text draws from a random state of its own, so it does not depend on the others.
    """
    ends = ends or Ends()
    with ExitStack() as stack:
        texts = []
        for index, prompt in enumerate(prompts):
            ids = engine.check_tokens(prompt)
            check_prompt(ids, engine.context)
            room = min(engine.context, len(ids) + ends.max_tokens)
            sequence = engine.sequence(ids, context=room, sampler=Sampler(sampling, ids))
            texts.append(Text(index, stack.enter_context(sequence), tokenizer, ends))
        yield from run(engine, texts)


def stream(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt: Iterable[int],
    *,
    sampling: Sampling | None = None,
    ends: Ends | None = None,
    sequence: Sequence | None = None,
) -> Iterator[Token]:
    """Yield the tokens of one prompt as they come.

    Args:
        engine: the packed model.
        tokenizer: of the model.
        prompt: token ids.
        sampling: how they are chosen; greedy by default.
        ends: where the text ends.
        sequence: keeps its cache between calls, as in a chat: only what is new in `prompt` is read.

    Raises:
        TurboSparseError: empty prompt, one that fills the context, or a full key-value budget.
    """
    if sequence is None:
        for _, token in stream_all(engine, tokenizer, [prompt], sampling=sampling, ends=ends):
            yield token
        return
    ids = engine.check_tokens(prompt)
    check_prompt(ids, sequence.context)
    sequence.replace(ids)
    sequence.sampler = Sampler(sampling, ids)
    for _, token in run(engine, [Text(0, sequence, tokenizer, ends or Ends())]):
        yield token


def check_prompt(ids: list[int], context: int) -> None:
    if not ids:
        raise TurboSparseError("the prompt holds no token, and the model has no start token")
    if len(ids) >= context:
        raise TurboSparseError(
            f"the prompt has {len(ids)} tokens; the model's context is {context}, "
            "and at least one must be left to generate: shorten the prompt"
        )


def run(engine: Engine, texts: list[Text]) -> Iterator[tuple[int, Token]]:
    """Decode texts together until each has ended; a cancelled one leaves the others alone."""
    while texts:
        began = time.perf_counter()
        try:
            steps = engine.step([text.sequence for text in texts])
        except Cancelled:
            for text in texts:
                if text.sequence.cancelled:
                    yield text.index, text.cancelled()
        else:
            seconds = time.perf_counter() - began
            for text, step in zip(texts, steps, strict=True):
                yield text.index, text.accept(step, seconds)
        texts = [text for text in texts if not text.finished]
