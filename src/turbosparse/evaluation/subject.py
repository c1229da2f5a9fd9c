"""A model under evaluation, and what is measured of it: items of tasks and of texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import lm_eval
import numpy as np

from turbosparse.base.errors import TurboSparseError
from turbosparse.base.machine import Device, device_to_use
from turbosparse.engine.api import Model
from turbosparse.engine.engine import Backend, Mode
from turbosparse.evaluation.compare import Items
from turbosparse.evaluation.harness import TurboSparseLM
from turbosparse.evaluation.tasks import open_tasks
from turbosparse.hf.hub import model_folder
from turbosparse.hf.load import activation_of, load_model, load_tokenizer
from turbosparse.packed.format import is_packed

BATCH = 8  # of transformers
FEWSHOT_SEED = 1234  # as in `lm_eval.simple_evaluate`, which besides asks pip what is installed
Measured = dict[tuple[str, str], Items]  # by task and metric


@dataclass(frozen=True)
class Subject:
    """A model of the harness, what runs it, and our own model if that is the engine."""

    lm: Any
    ran: str
    model: Model | None = None

    @classmethod
    def open(cls, source: str, mode: Mode, threads: int | None, device: Device = "auto") -> Subject:
        """A packed folder in our engine, any other model in transformers."""
        folder = model_folder(source)
        if is_packed(folder):
            backend: Backend = "gpu" if device == "cuda" else "cpu"
            ours = TurboSparseLM(str(folder), mode=mode, threads=threads, backend=backend)
            return cls(ours, ours.model.engine.describe(), ours.model)
        from lm_eval.models.huggingface import HFLM

        where = device_to_use(device)
        network = load_model(folder).eval().to(where)
        lm = HFLM(pretrained=network, tokenizer=load_tokenizer(folder), batch_size=BATCH)
        return cls(lm, f"{folder.name}: {activation_of(network.config)}, transformers on {where}")

    def tasks(self, names: Sequence[str], shots: int, limit: int | None) -> Measured:
        """Every metric of every task, item by item; a perplexity as the nats of an item."""
        if not names:
            return {}
        manager, specs = open_tasks(names, shots)
        loaded = manager.load(specs)
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)
            task.set_fewshot_seed(FEWSHOT_SEED)
        found = lm_eval.evaluate(self.lm, loaded, limit=limit, bootstrap_iters=0)
        measured: dict[tuple[str, str], list[float]] = {}
        for task, samples in found["samples"].items():
            for sample in sorted(samples, key=lambda one: (one["filter"], one["doc_id"])):
                how = "" if sample["filter"] == "none" else f", {sample['filter']}"
                for metric in sample["metrics"]:
                    sign = -1 if metric == "perplexity" else 1  # which is a log-likelihood
                    items = measured.setdefault((task, f"{metric}{how}"), [])
                    items.append(sign * float(sample[metric]))
        return {
            key: Items(np.array(values), perplexity=key[1] == "perplexity")
            for key, values in measured.items()
        }

    def perplexity(self, corpus: str, texts: Iterable[str], cut: Cut) -> Measured:
        """Nats per token of each window.

        Raises:
            TurboSparseError: no text has two tokens or more.
        """
        windows = list(cut.windows(map(self.lm.tok_encode, texts), self.lm.max_length))
        if not windows:
            raise TurboSparseError(f"corpus {corpus!r} holds no document of two tokens or more")
        scores = self.lm._loglikelihood_tokens([(None, *window) for window in windows])
        tokens = np.array([len(continuation) for _, continuation in windows], float)
        nats = -np.array([nats for nats, _ in scores]) / tokens
        return {(corpus, "perplexity"): Items(nats, tokens, perplexity=True)}


@dataclass(frozen=True)
class Cut:
    """How texts become windows: sizes as in the flags of `evaluate`."""

    window: int | None
    stride: int | None
    max_tokens: int | None

    def sizes(self, context: int) -> tuple[int, int]:
        """Tokens that a window reads, and those that it predicts."""
        window = min(self.window or 1024, context)
        return window, min(self.stride or max(1, window // 2), window)

    def windows(
        self, texts: Iterator[list[int]], context: int
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Contexts and continuations; every token but a text's first is predicted once."""
        window, stride = self.sizes(context)
        total = 0
        for ids in texts:
            start = 1
            while start < len(ids):
                end = min(len(ids), start + (window if start == 1 else stride))
                yield ids[max(0, end - window - 1) : start], ids[start:end]
                total += end - start
                start = end
                if self.max_tokens and total >= self.max_tokens:
                    return

    def side_by_side(self, texts: Iterable[str], one: Model, other: Model) -> list[list[int]]:
        """Windows for two models, which predict all tokens of each but its first."""
        context = min(one.engine.context, other.engine.context)
        window = self.sizes(context)[0]
        ids = (one.tokenizer.encode(text) for text in texts)
        plain = replace(self, window=window, stride=window).windows(ids, context)
        return [[before[-1], *after] for before, after in plain]

    def rule(self, context: int) -> str:
        window, stride = self.sizes(context)
        return (
            f"perplexity: exp of the mean nats of all tokens but the first of each document, each "
            f"predicted once from at most {window} tokens before it; behind the first window of a "
            f"document from at least {window - stride + 1} (stride {stride})"
        )
