"""What `turbosparse.load` returns: a packed model with its tokenizer, for programs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from turbosparse.base.errors import TurboSparseError
from turbosparse.engine.drafting import Draft, open_draft
from turbosparse.engine.engine import Backend, Engine, Mode
from turbosparse.engine.generation import Ends, Token, stream, stream_all
from turbosparse.engine.sampling import Sampling
from turbosparse.engine.scoring import log_probabilities
from turbosparse.engine.sequence import Sequence as Kept
from turbosparse.engine.text import Message, Tokenizer

Prompt = str | Sequence[int] | Sequence[Message]  # a text, token ids, or the turns of a chat


def load(
    folder: str | Path,
    *,
    backend: Backend = "auto",
    mode: Mode = "auto",
    threads: int | None = None,
    kv_bytes: int | None = None,
    memory: int | str | None = None,
    gpu_memory: int | str | None = None,
    draft: str | Path = "auto",
) -> Model:
    """Open a packed folder; see `engine.Engine` and, for `draft`, `engine.drafting.open_draft`."""
    engine = Engine(
        folder,
        backend=backend,
        mode=mode,
        threads=threads,
        kv_bytes=kv_bytes,
        memory=memory,
        gpu_memory=gpu_memory,
    )
    tokenizer = Tokenizer(folder)
    return Model(engine, tokenizer, open_draft(draft, engine, tokenizer))


class Model:
    """A packed model and its tokenizer.

    The settings of `stream` and `generate` are the fields of `sampling.Sampling`, besides
    `max_tokens` (256), `stop` (strings before which a text ends) and `stop_tokens` (further ids).
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, draft: Draft | None = None):
        self.engine, self.tokenizer, self.draft = engine, tokenizer, draft

    def stream(
        self, prompt: Prompt, *, sequence: Kept | None = None, **settings: Any
    ) -> Iterator[Token]:
        """Yield a text as it comes; `Token.text` are its pieces.

        With a `sequence`, made by `new_sequence`, the cache is kept between calls: only what is new
        in the prompt is read.
        """
        ids, chat = self._ids(prompt)
        sampling, ends = self._settings(settings, chat)
        return stream(
            self.engine,
            self.tokenizer,
            ids,
            sampling=sampling,
            ends=ends,
            sequence=sequence,
            draft=self.draft,
        )

    @overload
    def generate(self, prompt: str, **settings: Any) -> str: ...
    @overload
    def generate(self, prompt: Iterable[Prompt], **settings: Any) -> list[str]: ...
    def generate(self, prompt: Any, **settings: Any) -> Any:
        """The text that follows a prompt; of a list of prompts, decoded together, a list."""
        if isinstance(prompt, str):
            return self.generate([prompt], **settings)[0]
        prompts = [self._ids(one) for one in prompt]
        sampling, ends = self._settings(settings, any(chat for _, chat in prompts))
        texts = [""] * len(prompts)
        ids = [found for found, _ in prompts]
        for index, token in stream_all(
            self.engine, self.tokenizer, ids, sampling=sampling, ends=ends, draft=self.draft
        ):
            texts[index] += token.text
        return texts

    def score(self, text: str | Sequence[int]) -> NDArray[np.float32]:
        """Natural log-probability of every token after the first, each given those before it."""
        ids = self.tokenizer.encode(text) if isinstance(text, str) else list(text)
        if len(ids) < 2:
            raise TurboSparseError(f"a text of {len(ids)} tokens has nothing to score")
        targets = np.array(self.engine.check_tokens(ids)[1:])
        scores, start = [], 0
        for logits in self.engine.logits(ids[:-1]):
            scores.append(log_probabilities(logits, targets[start : start + len(logits)]))
            start += len(logits)
        return np.concatenate(scores).astype(np.float32)

    def new_sequence(self) -> Kept:
        """An empty text to keep between calls of `stream`; `free` it at the end."""
        return self.engine.sequence()

    def _ids(self, prompt: Prompt) -> tuple[list[int], bool]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt), False
        items = list(prompt)
        if items and all(isinstance(item, dict) for item in items):
            return self.tokenizer.chat(items), True  # type: ignore[arg-type]
        return self.engine.check_tokens(items), False  # type: ignore[arg-type]

    def _settings(self, settings: dict[str, Any], chat: bool) -> tuple[Sampling, Ends]:
        settings = dict(settings)
        strings, extra = settings.pop("stop", ()), settings.pop("stop_tokens", ())
        ends = Ends(
            settings.pop("max_tokens", 256),
            self.tokenizer.stop_ids(chat=chat) | frozenset(self.engine.check_tokens(extra)),
            (strings,) if isinstance(strings, str) else tuple(strings),
        )
        unknown = [name for name in settings if name not in Sampling.__dataclass_fields__]
        if unknown:
            known = ", ".join(["max_tokens", "stop", "stop_tokens", *Sampling.__dataclass_fields__])
            raise TurboSparseError(f"setting {unknown[0]!r} is unknown; use {known}")
        sampling = Sampling(**settings)
        self.engine.check_tokens(sampling.logit_bias)
        return sampling, ends
