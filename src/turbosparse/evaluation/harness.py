"""Our engine as a model of lm-evaluation-harness."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from turbosparse.base.errors import TurboSparseError
from turbosparse.engine.api import Model, load
from turbosparse.engine.engine import Backend, Mode
from turbosparse.engine.generation import Ends, stream_all
from turbosparse.engine.sampling import Sampling
from turbosparse.engine.scoring import score

TOGETHER = 16  # texts that are generated together
NEW_TOKENS = 256  # where a task does not say
_KNOWN = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}


@register_model("turbosparse")
class TurboSparseLM(TemplateLM):
    """A packed folder.

    Args:
        pretrained: packed folder.
        mode: as of `Engine`.
        threads: of the C++ core.
        backend: as of `Engine`.
        batch_size, max_batch_size, device: what the harness passes to every model; unused, for the
            engine batches by tokens.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        mode: Mode = "auto",
        threads: int | None = None,
        backend: Backend = "auto",
        batch_size: object = None,  # noqa: ARG002
        max_batch_size: object = None,  # noqa: ARG002
        device: object = None,  # noqa: ARG002
    ):
        super().__init__()
        self.model: Model = load(pretrained, mode=mode, threads=threads, backend=backend)

    @property
    def max_length(self) -> int:
        return self.model.engine.context

    @property
    def eot_token_id(self) -> int:
        ends = self.model.tokenizer.eos, *sorted(self.model.tokenizer.stop_ids())
        return next((token for token in ends if token is not None), 0)

    @property
    def prefix_token_id(self) -> int:
        bos = self.model.tokenizer.bos
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return str(self.model.tokenizer.folder).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        return self.model.tokenizer.chat_template if chat_template else ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.model.tokenizer.chat_text(chat_history, answer=add_generation_prompt)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: object
    ) -> list[int]:
        tokenizer = self.model.tokenizer
        plain = tokenizer.encode(string, special=False)
        begun = tokenizer.bos is not None and plain[:1] == [tokenizer.bos]
        if add_special_tokens is False or (add_special_tokens is None and begun):
            return plain
        return tokenizer.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: object
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        found = [(one.log_probability, one.greedy) for one in score(self.model.engine, pairs)]
        for (text, *_rest), answer in zip(requests, found, strict=True):
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, answer)
        return found

    def loglikelihood_rolling(
        self,
        requests: list[Any],
        disable_tqdm: bool = False,  # noqa: ARG002
    ) -> list[float]:
        windows = [
            (number, *make_disjoint_window(window))
            for number, request in enumerate(requests)
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
        ]
        sums = [0.0] * len(requests)
        scores = self._loglikelihood_tokens([(None, *pair) for _, *pair in windows])
        for (number, *_pair), (nats, _greedy) in zip(windows, scores, strict=True):
            sums[number] += nats
        return sums

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:  # noqa: ARG002
        alike: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            alike[repr(request.args[1])].append(number)
        texts = [""] * len(requests)
        for numbers in alike.values():
            sampling, ends = self._settings(requests[numbers[0]].args[1])
            room = self.max_length - ends.max_tokens
            if room < 1:
                raise TurboSparseError(
                    f"the task generates {ends.max_tokens} tokens, and the model's context is "
                    f"{self.max_length}; give fewer, such as --gen_kwargs max_gen_toks=64"
                )
            prompts = {n: self.tok_encode(requests[n].args[0])[-room:] for n in numbers}
            numbers.sort(key=lambda number: len(prompts[number]))
            for start in range(0, len(numbers), TOGETHER):
                some = numbers[start : start + TOGETHER]
                for index, token in stream_all(
                    self.model.engine,
                    self.model.tokenizer,
                    [prompts[number] for number in some],
                    sampling=sampling,
                    ends=ends,
                ):
                    texts[some[index]] += token.text
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _settings(self, asked: dict[str, Any]) -> tuple[Sampling, Ends]:
        if unknown := set(asked) - _KNOWN:
            known = ", ".join(sorted(_KNOWN))
            raise TurboSparseError(f"generation setting {min(unknown)!r} is unknown; use {known}")
        draws = asked.get("do_sample", bool(asked.get("temperature")))
        drawn = {key: asked[key] for key in ("temperature", "top_p", "top_k") if key in asked}
        until = asked.get("until") or []
        ends = Ends(
            int(asked.get("max_gen_toks", NEW_TOKENS)),
            self.model.tokenizer.stop_ids(),
            (until,) if isinstance(until, str) else tuple(until),
        )
        return Sampling(**({"temperature": 1.0} | drawn) if draws else {}), ends
