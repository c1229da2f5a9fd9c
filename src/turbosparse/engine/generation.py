"""The one loop from prompts to text; everything that generates consumes it. Loads no torch."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Literal

from turbosparse.base.errors import TurboSparseError
from turbosparse.engine.drafting import Draft
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
    seconds: float  # its share of the pass that gave it; the first one's is the prompt's
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
    """One text in the making.

    Args:
        index: of the text among those decoded together.
        sequence: holds its prompt.
        tokenizer: of the model.
        ends: where it ends.
        draft: guesses its tokens.
    """

    def __init__(
        self,
        index: int,
        sequence: Sequence,
        tokenizer: Tokenizer,
        ends: Ends,
        draft: Draft | None = None,
    ):
        self.index, self.sequence, self.ends = index, sequence, ends
        self.finished = False
        self._count = 0
        self._pieces = Detokenizer(tokenizer, sequence.tokens)
        self._stops = StopStrings(ends.strings)
        self._draft = draft
        self._guesser = draft.guesser() if draft else None

    def advance(self) -> list[tuple[Token, Step]]:
        """One pass over this text alone: a token, and as many as were guessed right before it.

        Raises:
            As `Engine.step`; the text is then as it was.
        """
        began = time.perf_counter()
        sequence, known = self.sequence, len(self.sequence.tokens)
        guesses, steps = self._read(self._guesses() if self._count else [])
        tokens: list[Token] = []
        for step, guess in zip(steps, [*guesses, None], strict=True):
            tokens.append(self._choose(step, known + len(tokens)))
            if self.finished or tokens[-1].id != guess:
                break
        if guesses:
            sequence.truncate(known + len(tokens) - 1)
        self._extend(tokens[-1].id)
        seconds = time.perf_counter() - began
        if self._draft and self._count > len(tokens):  # the first pass reads the prompt
            self._draft.note(len(guesses), len(tokens) - 1, seconds)
        share = seconds / len(tokens)
        told = [replace(token, seconds=share) for token in tokens]
        return list(zip(told, steps, strict=False))

    def _read(self, guesses: list[int]) -> tuple[list[int], list[Step]]:
        """Read what is pending and the guesses, or no guess where memory is short."""
        sequence, known = self.sequence, len(self.sequence.tokens)
        engine = sequence.engine
        try:
            sequence.extend(guesses)
            return guesses, engine.verify(sequence) if guesses else engine.step([sequence])
        except BaseException as error:
            sequence.truncate(known)
            if (
                not guesses
                or isinstance(error, Cancelled)
                or not isinstance(error, TurboSparseError)
            ):
                raise
        return self._read([])

    def _guesses(self) -> list[int]:
        if not self._draft or not self._guesser or not (count := self._draft.length()):
            return []
        tokens = self.sequence.tokens
        room = min(self.sequence.context - len(tokens), self.ends.max_tokens - self._count) - 1
        return self._guesser.guess(tokens, count) if count <= room else []

    def accept(self, step: Step, seconds: float) -> Token:
        """Choose the token that follows a step."""
        token = replace(self._choose(step, len(self.sequence.tokens)), seconds=seconds)
        self._extend(token.id)
        return token

    def _choose(self, step: Step, length: int) -> Token:
        """The token that follows a step, in which the text had this length."""
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
            elif length == self.sequence.context:
                finish = "context"
        if finish and not stopped:
            rest, stopped = self._stops.step(self._pieces.finish())
            piece += rest + ("" if stopped else self._stops.finish())
        self.finished = finish is not None
        return Token(token, piece, 0.0, step.active, step.candidates, finish)

    def _extend(self, token: int) -> None:
        if len(self.sequence.tokens) < self.sequence.context:
            self.sequence.extend([token])

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
    draft: Draft | None = None,
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
            texts.append(Text(index, stack.enter_context(sequence), tokenizer, ends, draft))
        yield from run(engine, texts)


def stream(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt: Iterable[int],
    *,
    sampling: Sampling | None = None,
    ends: Ends | None = None,
    sequence: Sequence | None = None,
    draft: Draft | None = None,
) -> Iterator[Token]:
    """Yield the tokens of one prompt as they come.

    Args:
        engine: the packed model.
        tokenizer: of the model.
        prompt: token ids.
        sampling: how they are chosen; greedy by default.
        ends: where the text ends.
        sequence: keeps its cache between calls, as in a chat: only what is new in `prompt` is read.
        draft: guesses tokens ahead; the text is the same, and comes sooner where guesses hold.

    Raises:
        TurboSparseError: empty prompt, one that fills the context, or a full key-value budget.
    """
    if sequence is None:
        for _, token in stream_all(
            engine, tokenizer, [prompt], sampling=sampling, ends=ends, draft=draft
        ):
            yield token
        return
    ids = engine.check_tokens(prompt)
    check_prompt(ids, sequence.context)
    sequence.replace(ids)
    sequence.sampler = Sampler(sampling, ids)
    for _, token in run(engine, [Text(0, sequence, tokenizer, ends or Ends(), draft)]):
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
    """Decode texts together until each has ended; a cancelled one leaves the others alone.

    Only a text that is alone is guessed ahead: several share their passes already.
    """
    while texts:
        try:
            if len(texts) == 1:
                found = [(texts[0], token) for token, _ in texts[0].advance()]
            else:
                began = time.perf_counter()
                steps = engine.step([text.sequence for text in texts])
                seconds = time.perf_counter() - began
                found = [
                    (text, text.accept(step, seconds))
                    for text, step in zip(texts, steps, strict=True)
                ]
        except Cancelled:
            found = [(text, text.cancelled()) for text in texts if text.sequence.cancelled]
        for text, token in found:
            yield text.index, token
        texts = [text for text in texts if not text.finished]
