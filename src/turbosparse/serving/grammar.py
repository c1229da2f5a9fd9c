"""Grammars and JSON schemas that a text must follow, by the llguidance library."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import llguidance
import numpy as np
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from turbosparse.base.errors import TurboSparseError
from turbosparse.engine.sampling import Logits
from turbosparse.serving.errors import ApiError

ANY_OBJECT: dict[str, Any] = {"type": "object"}


class Grammars:
    """What a tokenizer knows of grammars.

    Args:
        folder: has the model's ``tokenizer.json``.
        vocabulary: the model's, which may be larger than the tokenizer's.
        stops: tokens that may come when a grammar is fulfilled.
    """

    def __init__(self, folder: Path, vocabulary: int, stops: Iterable[int]):
        text = (folder / "tokenizer.json").read_text(encoding="utf-8")
        self._tokens = llguidance.LLTokenizer(text, n_vocab=vocabulary, eos_token=sorted(stops))

    def of_schema(self, schema: dict[str, Any]) -> Follow:
        """JSON that fits a schema, without space between its parts."""
        source = llguidance.LLMatcher.grammar_from_json_schema(
            schema, defaults={"whitespace_flexible": False}
        )
        return self._of(source, "response_format")

    def of_lark(self, grammar: str, param: str = "grammar") -> Follow:
        """A grammar in the Lark form of llguidance, which comes from this parameter."""
        return self._of(llguidance.LLMatcher.grammar_from_lark(grammar), param)

    def _of(self, source: str, param: str) -> Follow:
        matcher = llguidance.LLMatcher(self._tokens, source, log_level=0)
        if matcher.is_error():
            raise ApiError(400, f"{param} cannot be used: {matcher.get_error()[:500]}", param=param)
        return Follow(matcher, self._tokens.vocab_size)


class Follow:
    """The place of one text in its grammar: a `sampling.Grammar`."""

    def __init__(self, matcher: llguidance.LLMatcher, vocabulary: int):
        self._matcher, self._vocabulary = matcher, vocabulary
        self._bits = allocate_token_bitmask(1, vocabulary)

    def __deepcopy__(self, _: Any) -> Self:
        return type(self)(self._matcher.deep_copy(), self._vocabulary)

    def mask(self, logits: Logits) -> Logits:
        fill_next_token_bitmask(self._matcher, self._bits)
        allowed = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: len(logits)]
        if not allowed.any():  # a limit of the library, in a grammar that is too complex
            raise TurboSparseError(f"the grammar allows no token: {self._matcher.get_error()}")
        return np.where(allowed, logits, np.float32(-np.inf))

    def accept(self, token: int) -> None:
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)
