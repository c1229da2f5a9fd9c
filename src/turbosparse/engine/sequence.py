"""One text of the engine: its tokens, its key-value cache and its sampler."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Self

from turbosparse.base.errors import TurboSparseError
from turbosparse.engine.sampling import Sampler

if TYPE_CHECKING:
    from turbosparse.engine.engine import Engine


class Cancelled(TurboSparseError):
    """A step was cancelled; it changed nothing."""


class Sequence:
    """Made by `Engine.sequence`. Keep it, and only new tokens are read in the next step.

    `tokens` are all tokens of the text; the cache holds the first `length` of them, and the next
    `Engine.step` reads the rest.
    """

    def __init__(self, engine: Engine, context: int, sampler: Sampler | None = None):
        self.engine, self.context = engine, context
        self.tokens: list[int] = []
        self.sampler = sampler or Sampler()
        self.reserved = 0  # bytes of the budget
        self.cancelled = False
        self.cancel_step: Any = None  # the flag of the step that reads this sequence
        engine.budget.reserve([(self, engine.decoder.cache_bytes(0, context))])
        self.cache: Any = engine.decoder.new_cache(context)

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return int(self.cache.length)

    @property
    def pending(self) -> list[int]:
        """Tokens that the next step reads."""
        return self.tokens[self.length :]

    def extend(self, tokens: Iterable[int]) -> None:
        """Add tokens to the end.

        Raises:
            TurboSparseError: one is not a token of the model, or they do not fit the context.
        """
        new = self.engine.check_tokens(tokens)
        end = len(self.tokens) + len(new)
        if end > self.context:
            raise TurboSparseError(f"{end} tokens do not fit the context of {self.context}")
        self.tokens += new

    def truncate(self, length: int) -> None:
        """Forget the tokens after the first `length`; their memory is given back."""
        if not 0 <= length <= len(self.tokens):
            raise TurboSparseError(f"length {length} must be 0 to {len(self.tokens)}")
        del self.tokens[length:]
        if length < self.cache.length:
            self.cache.truncate(length)
        needed = self.engine.decoder.cache_bytes(self.length, self.context)
        self.engine.budget.reserve([(self, needed)])

    def replace(self, tokens: Iterable[int]) -> None:
        """Make the text these tokens; what it has in common with the cache is not read again.

        A chat does so with its next prompt. At least one token is left for the next step to read.
        """
        new = self.engine.check_tokens(tokens)
        same = 0
        for old, token in zip(self.tokens[: self.length], new[:-1], strict=False):
            if old != token:
                break
            same += 1
        self.truncate(same)
        self.extend(new[same:])

    def fork(self, length: int | None = None) -> Sequence:
        """A copy that continues on its own, from the same cache and sampler state.

        With a `length` it is of the first so many tokens.
        """
        end = len(self.tokens) if length is None else min(length, len(self.tokens))
        cached = min(end, self.length)
        other = Sequence(self.engine, self.context, self.sampler.copy())
        needed = self.engine.decoder.cache_bytes(cached, self.context)
        self.engine.budget.reserve([(other, needed)])
        other.tokens, other.cache = self.tokens[:end], self.cache.copy(cached)
        return other

    def cancel(self) -> None:
        """End the step that reads this sequence between two layers, and refuse further ones.

        May be called from any thread; `resume` takes it back.
        """
        self.cancelled = True  # before the flag: a step that begins now sees one or the other
        if (flag := self.cancel_step) is not None:
            flag.set()

    def resume(self) -> None:
        self.cancelled = False

    def drop(self) -> None:
        """Forget the cache and keep the tokens: the next step reads them all again."""
        self.cache.truncate(0)
        self.engine.budget.reserve([(self, self.engine.decoder.cache_bytes(0, self.context))])

    def free(self) -> None:
        """Forget everything and give the memory back."""
        self.tokens.clear()
        self.cache.free()
        self.engine.budget.reserve([(self, 0)])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.free()


class Budget:
    """The bytes that the caches of an engine may take together."""

    def __init__(self, limit: int):
        self.limit = limit
        self._lock = threading.Lock()
        self._sequences: weakref.WeakSet[Sequence] = weakref.WeakSet()

    @property
    def used(self) -> int:
        return sum(sequence.reserved for sequence in self._sequences)

    def reserve(self, sizes: list[tuple[Sequence, int]]) -> None:
        """Set what each sequence may take, all or none.

        Raises:
            TurboSparseError: it is more than the budget.
        """
        with self._lock:
            self._sequences.update(sequence for sequence, _ in sizes)
            more = sum(size - sequence.reserved for sequence, size in sizes)
            if more > 0 and self.used + more > self.limit:
                raise TurboSparseError(
                    f"the key-value cache needs {more / 1e6:.1f} MB more, and "
                    f"{self.used / 1e6:.1f} of {self.limit / 1e6:.1f} MB are in use; use a shorter "
                    "prompt or fewer sequences, free some, or raise the budget (--kv-bytes)"
                )
            for sequence, size in sizes:
                sequence.reserved = size
