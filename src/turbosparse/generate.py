"""Stage 6: text from a packed folder. `stream` is the one loop; everything else consumes it.

turbosparse generate mistral-q4 --prompt "Once upon a time"
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from cyclopts import Parameter
from torch import Tensor

from turbosparse.base.errors import TurboSparseError
from turbosparse.base.folders import read_config
from turbosparse.engine.engine import Backend, Engine, Mode
from turbosparse.hf.load import load_tokenizer


@dataclass(frozen=True)
class Token:
    """One generated token."""

    id: int
    text: str  # may be empty while a character is incomplete
    seconds: float  # of the forward pass that gave it; the first one's is the prompt's
    active: float  # share of active neurons in that pass
    candidates: float  # share that a predictor let through; 1 without
    finish: Literal["stop", "length", "context"] | None = None


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

    def __str__(self) -> str:
        density = self.predicted_density
        predicted = f"predicted density {density:.1%}; " if density < 1 else ""
        return (
            f"[{self.ran}] prompt {self.prompt_tokens} tokens in {self.prompt_seconds:.2f} s; "
            f"{self.tokens} tokens at {self.tokens_per_second:.1f} tokens/s; "
            f"activation sparsity {self.activation_sparsity:.1%}; {predicted}"
            f"stopped by {self.finish}"
        )


def stream(
    engine: Engine,
    tokenizer: Any,
    prompt: list[int],
    *,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop: frozenset[int] = frozenset(),
) -> Iterator[Token]:
    """Yield tokens as they come.

    Args:
        engine: the packed model.
        tokenizer: the model's transformers tokenizer.
        prompt: token ids.
        max_tokens: at most so many.
        temperature: 0 is greedy.
        top_p: sample from the smallest set of tokens that holds this probability.
        seed: of the sampling.
        stop: token ids that end the text; the last Token is then one of them, with empty text.

    Raises:
        TurboSparseError: empty prompt, a prompt that fills the context, or sampling settings out of
            range.
    """
    from tokenizers.decoders import DecodeStream

    if len(prompt) >= engine.context:
        raise TurboSparseError(
            f"the prompt has {len(prompt)} tokens; the model's context is {engine.context}, "
            "and at least one must be left to generate: shorten the prompt"
        )
    if max_tokens < 1:
        raise TurboSparseError(f"max-tokens {max_tokens} must be 1 or more")
    if not temperature >= 0 or not 0 < top_p <= 1:  # NaN compares false
        raise TurboSparseError(
            f"temperature {temperature:g} must be 0 or more, "
            f"and top-p {top_p:g} above 0 and at most 1"
        )
    if seed is not None and not 0 <= seed < 2**63:
        raise TurboSparseError(f"seed {seed} must be from 0 to {2**63 - 1}")
    random = torch.Generator()
    random.manual_seed(seed) if seed is not None else random.seed()
    text = DecodeStream(ids=prompt, skip_special_tokens=True)
    cache = engine.new_cache()
    began = time.perf_counter()
    step = engine.prefill(prompt, cache)
    for count in range(1, max_tokens + 1):
        token = choose(step.logits, temperature, top_p, random)
        seconds = time.perf_counter() - began
        finish: Literal["stop", "length", "context"] | None = None
        if token in stop:
            finish = "stop"
        elif count == max_tokens:
            finish = "length"
        elif cache.length == engine.context:
            finish = "context"
        piece = "" if finish == "stop" else text.step(tokenizer.backend_tokenizer, token) or ""
        yield Token(token, piece, seconds, step.active, step.candidates, finish)
        if finish:
            return
        began = time.perf_counter()
        step = engine.step([token], cache)


def choose(logits: Tensor, temperature: float, top_p: float, random: torch.Generator) -> int:
    """Pick a token from ``[vocabulary]`` logits: greedy, or nucleus sampling."""
    if temperature == 0:
        return int(logits.argmax())
    # in doubles and from the largest down: no temperature, however low, overflows
    scaled = (logits - logits.max()).double() / temperature
    probabilities, ids = scaled.float().softmax(-1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = torch.where(before < top_p, probabilities, 0.0)  # the likeliest always stays
    return int(ids[torch.multinomial(probabilities, 1, generator=random)])


def generate(
    model: Path,
    *,
    prompt: Annotated[str, Parameter(allow_leading_hyphen=True)],
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop_token: list[str] | None = None,
    chat: bool = False,
    mode: Mode = "auto",
    backend: Backend = "auto",
    threads: int | None = None,
) -> Generated:
    """Continue a prompt; the text streams to standard output.

    Parameters
    ----------
    model
        Packed folder.
    prompt
        Text to continue; "" starts from the model's start token. "-" reads standard input.
    max_tokens
        Generate at most so many tokens.
    temperature
        0 is greedy: always the likeliest token.
    top_p
        Sample from the smallest set of tokens that holds this probability.
    seed
        Makes sampling repeatable.
    stop_token
        A further token that ends the text, as its id or its text; may be repeated.
    chat
        Put the prompt into the model's chat template as the user's turn.
    mode
        exact skips neurons that are exactly zero and loses nothing; predicted also those that the
        folder's predictor does not pick, and may lose some; dense reads all.
    backend
        cpu is the C++ core; torch the slow reference.
    threads
        Threads of the C++ core; by default all processors of this process.
    """
    engine = Engine(model, backend=backend, mode=mode, threads=threads)
    tokenizer = load_tokenizer(model)
    ids = prompt_ids(tokenizer, _read(prompt), chat=chat)
    stop = stop_ids(model, tokenizer, stop_token or [], chat=chat)
    tokens: list[Token] = []
    for token in stream(
        engine,
        tokenizer,
        ids,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=stop,
    ):
        tokens.append(token)
        sys.stdout.write(token.text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return summarise(tokens, len(ids), engine.describe())


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


def prompt_ids(tokenizer: Any, prompt: str, *, chat: bool = False) -> list[int]:
    """Tokenise a prompt, with the model's start token, or inside its chat template."""
    if not chat:
        ids: list[int] = tokenizer(prompt, verbose=False)["input_ids"]
        if not ids and tokenizer.bos_token_id is not None:
            return [tokenizer.bos_token_id]
        return ids
    if not tokenizer.chat_template:
        raise TurboSparseError("this model has no chat template; leave out --chat")
    turns = [{"role": "user", "content": prompt}]
    encoded = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])


def stop_ids(
    folder: Path, tokenizer: Any, extra: list[str], *, chat: bool = False
) -> frozenset[int]:
    """Token ids that end a text: of the configs, in a chat of the tokenizer, and `extra`."""
    found: set[int] = set()
    configs = [read_config(folder)]
    if (folder / "generation_config.json").is_file():
        configs.append(read_config(folder, "generation_config.json"))
    for config in configs:
        eos = config.get("eos_token_id")
        found.update(eos if isinstance(eos, list) else [eos] if eos is not None else [])
    if chat and tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    vocabulary = tokenizer.get_vocab()
    for token in extra:
        if token not in vocabulary and not token.isdecimal():
            raise TurboSparseError(
                f"--stop-token {token!r} is neither a token of the model nor an id"
            )
        found.add(
            vocabulary[token] if token in vocabulary and not token.isdecimal() else int(token)
        )
    return frozenset(found)
