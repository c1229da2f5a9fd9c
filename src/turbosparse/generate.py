"""Stage 6: text from a packed folder.

turbosparse generate mistral-q4 "Once upon a time"
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from turbosparse.base.errors import TurboSparseError
from turbosparse.base.folders import AnyPath, local_path
from turbosparse.benchmark.expected import expected_of
from turbosparse.engine.drafting import open_draft
from turbosparse.engine.engine import Backend, Engine, Mode
from turbosparse.engine.generation import Ends, Token, stream
from turbosparse.engine.sampling import Sampling
from turbosparse.engine.text import Tokenizer


@dataclass(frozen=True)
class Generated:
    """A completed generation."""

    text: str
    finish: str
    prompt_tokens: int
    tokens: int
    prompt_seconds: float
    tokens_per_second: float  # of decoding, the prompt left out
    activation_sparsity: float  # of decoding
    predicted_density: float  # share of candidates in decoding; 1 outside predicted mode
    ran: str
    expected: float | None = None  # tokens/s from disk, where `plan` has measured the machine

    def __str__(self) -> str:
        density = self.predicted_density
        predicted = f"predicted density {density:.1%}; " if density < 1 else ""
        expected = f" ({self.expected:.2g} expected)" if self.expected else ""
        return (
            f"[{self.ran}] prompt {self.prompt_tokens} tokens in {self.prompt_seconds:.2f} s; "
            f"{self.tokens} tokens at {self.tokens_per_second:.1f} tokens/s{expected}; "
            f"activation sparsity {self.activation_sparsity:.1%}; {predicted}"
            f"stopped by {self.finish}"
        )


def generate(
    model: AnyPath,
    prompt: Annotated[str, Parameter(name=("--prompt", "-p"), allow_leading_hyphen=True)],
    *,
    max_tokens: Annotated[int, Parameter(name=("--max-tokens", "-n"))] = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    seed: int | None = None,
    stop: list[str] | None = None,
    stop_token: list[str] | None = None,
    chat: bool = False,
    mode: Mode = "auto",
    backend: Backend = "auto",
    threads: int | None = None,
    kv_bytes: int | None = None,
    memory: str | None = None,
    gpu_memory: str | None = None,
    draft: str = "auto",
    show: Annotated[Callable[[str], Any] | None, Parameter(parse=False)] = None,
) -> Generated:
    """Continue a prompt; the text streams to standard output.

    Parameters
    ----------
    model
        Packed folder.
    prompt
        Text to continue; "" starts from the model's start token. "-" reads standard input.
    max_tokens
        Generate at most this many tokens.
    temperature
        0 is greedy: always the likeliest token.
    top_k
        Sample from this many of the likeliest tokens; 0 is all.
    top_p
        Sample from the smallest set of tokens that holds this probability.
    min_p
        Sample from tokens that are at least this share as likely as the likeliest.
    repetition_penalty
        Divides the logits of tokens that came in prompt or text; 1 is none.
    presence_penalty
        Subtracted from the logits of tokens that came in the text.
    frequency_penalty
        The same, times how often they came.
    seed
        Makes sampling repeatable.
    stop
        A string before which the text ends; may be repeated.
    stop_token
        A further token that ends the text, as its id or its text; may be repeated.
    chat
        Put the prompt into the model's chat template as the user's turn.
    mode
        exact skips neurons that are exactly zero and loses nothing; predicted also those that the
        folder's predictor does not pick, and may lose some; dense reads all.
    backend
        cpu is the C++ core; gpu an NVIDIA card; torch the slow reference.
    threads
        Threads of the C++ core; by default all processors of this process.
    kv_bytes
        Memory for keys and values, at most; by default half of what is available.
    memory
        What the process may take of the memory, like 8GiB. A model that is larger runs from disk,
        with the rows in use in a cache.
    gpu_memory
        What to take of the card, like 8GiB, with --backend gpu; neurons that do not fit stay on the
        processor.
    draft
        Who guesses tokens ahead, so that one pass can check several. The text is the same, and
        guessing rests where it does not pay. "auto" (or "ngram") looks up what followed the last
        words before; a packed folder is a smaller model of the same vocabulary; "off" is nobody.
    show
        Called with each piece of text as it comes.
    """
    sampling = Sampling(
        temperature,
        top_k,
        top_p,
        min_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        seed,
    )
    check_packed(local_path(model), "generate")
    engine = Engine(
        model,
        backend=backend,
        mode=mode,
        threads=threads,
        kv_bytes=kv_bytes,
        memory=memory,
        gpu_memory=gpu_memory,
    )
    tokenizer = Tokenizer(model)
    text = _read(prompt)
    ids = tokenizer.chat([{"role": "user", "content": text}]) if chat else tokenizer.encode(text)
    ends = Ends(max_tokens, tokenizer.stop_ids(stop_token or [], chat=chat), tuple(stop or ()))
    guesses = open_draft(draft, engine, tokenizer)
    tokens: list[Token] = []
    for token in stream(engine, tokenizer, ids, sampling=sampling, ends=ends, draft=guesses):
        tokens.append(token)
        if show:
            show(token.text)
    if show:
        show("\n")
    ran = engine.describe() + (f", {guesses}" if guesses else "")
    return replace(summarise(tokens, len(ids), ran), expected=expected_of(engine))


def check_packed(model: Path, verb: str) -> None:
    """Say which commands pack a model that is none yet: a Hugging Face folder, a hub id, a GGUF.

    Args:
        model: what was given for a packed folder.
        verb: the command to run afterwards.

    Raises:
        TurboSparseError: it is one of these.
    """
    name = f"{model.name.removesuffix('.gguf')}-packed"
    hub = not model.exists() and len(model.parts) == 2 and not str(model).startswith((".", "/"))
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        plain = "format_version" not in (config.get("turbosparse") or {})
    except (OSError, ValueError, RecursionError, AttributeError, TypeError):
        plain = False
    if hub or plain or model.suffix == ".gguf":
        raise TurboSparseError(
            f"{model} is not a packed folder; pack it first: `turbosparse pack {model} {name}`, "
            f"then `turbosparse {verb} {name}`"
        )


def _read(prompt: str) -> str:
    try:
        text = sys.stdin.read() if prompt == "-" else prompt
        text.encode()
    except UnicodeError as error:
        raise TurboSparseError(f"the prompt is not valid UTF-8: {error}") from error
    return text


def summarise(tokens: list[Token], prompt_tokens: int, ran: str) -> Generated:
    """The figures of a generation; the first token's pass is the prompt's, and not in its speed."""
    decoding = tokens[1:]
    seconds = sum(token.seconds for token in decoding)
    active = statistics.fmean(token.active for token in decoding or tokens)
    candidates = statistics.fmean(token.candidates for token in decoding or tokens)
    return Generated(
        text="".join(token.text for token in tokens),
        finish=str(tokens[-1].finish),
        prompt_tokens=prompt_tokens,
        tokens=len(tokens),
        prompt_seconds=tokens[0].seconds,
        tokens_per_second=len(decoding) / seconds if seconds else 0.0,
        activation_sparsity=1 - active,
        predicted_density=candidates,
        ran=ran,
    )
