"""Run a model over text and count: perplexity, and what its feed-forwards do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from turbosparse.analysis.counts import Counter, count_windows
from turbosparse.base.errors import TurboSparseError
from turbosparse.base.progress import track
from turbosparse.hf.layerwise import Layerwise
from turbosparse.hf.load import check_ids
from turbosparse.packed.stats import Stats

BATCH_TOKENS = 2048
BLOCK_TOKENS = 65_536  # of a corpus that are in memory together


@torch.inference_mode()
def measure(
    model: Any,
    tokenizer: Any,
    corpora: Mapping[str, Iterable[str]],
    *,
    window: int | None = None,
    truncate: bool = False,
    max_tokens: int | None = None,
) -> Stats:
    """Run a model over each corpus and count.

    Every token but the first of a document is predicted once, from at most `window` tokens before
    it; with `truncate` only those of the document's first window. A corpus is read in blocks of
    `BLOCK_TOKENS`.

    Args:
        model: as transformers loads it, or a `Layerwise`.

    Raises:
        TurboSparseError: a corpus gives no token to predict, or the loss is not finite.
    """
    config = model.config
    window = min(window or 1024, config.max_position_embeddings)
    stats = Stats.empty(config)
    counter = Counter(stats, config)
    for corpus, texts in corpora.items():
        before = torch.stack([stats.active.sum(-1), stats.tokens])
        stats.nats[corpus], stats.predicted[corpus] = 0.0, 0
        pieces = windows(tokenizer, texts, window, truncate, max_tokens, config.vocab_size)
        for block in _blocks(pieces):
            for ids, logits in _logits(model, counter, track(batches(block), corpus)):
                stats.nats[corpus] += nats_of(logits, ids)
                stats.predicted[corpus] += int((ids[:, 1:] >= 0).sum())
                count_windows(stats, ids)
        if not stats.predicted[corpus]:
            raise TurboSparseError(f"corpus {corpus!r} holds no document of two tokens or more")
        if not math.isfinite(stats.nats[corpus]):
            raise TurboSparseError(
                f"the loss on {corpus} is {stats.nats[corpus]}: the model has weights that are NaN "
                "or infinite, or that overflow; check them, or measure with --dtype float32"
            )
        stats.corpora[corpus] = torch.stack([stats.active.sum(-1), stats.tokens]) - before
    stats.words = _words(tokenizer, counter.sample_ids) if corpora else []
    return stats


def nats_of(logits: Tensor, ids: Tensor) -> float:
    """Cross-entropy of a batch's predicted tokens, summed; padding does not count."""
    targets = ids[:, 1:].flatten().to(logits.device)
    return float(cross_entropy(logits.flatten(0, 1).float(), targets, reduction="sum"))


def _words(tokenizer: Any, ids: list[int]) -> list[str]:
    """What each token adds to the text."""
    texts = [tokenizer.decode(ids[:count]) for count in range(len(ids) + 1)]
    return [after[len(before) :] for before, after in pairwise(texts)]


def _logits(
    model: Any, counter: Counter, batches: Iterable[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each batch with its logits; neurons are counted on the way."""
    if isinstance(model, Layerwise):
        yield from _layer_by_layer(model, counter, list(batches))
        return
    model.eval()
    for ids in batches:
        inputs = ids[:, :-1].clamp(min=0).to(model.device)
        with counter.watch(model, ids):
            yield ids, model(inputs, use_cache=False).logits.cpu()


def _layer_by_layer(
    model: Layerwise, counter: Counter, batches: list[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    hidden = [model.embed(ids[:, :-1].clamp(min=0)) for ids in batches]
    for index in track(range(model.config.num_hidden_layers), "layers"):
        shell = model.layer(index)
        layer = SimpleNamespace(model=shell, config=model.config)
        for number, ids in enumerate(batches):
            with counter.watch(layer, ids, index):
                hidden[number] = model.run(shell, hidden[number])
    for ids, states in zip(batches, hidden, strict=True):
        normed = model.norm(states)
        counter.begin(ids)
        counter.see_input("head", 0, normed.flatten(0, -2))
        yield ids, model.head(normed)


def windows(
    tokenizer: Any,
    texts: Iterable[str],
    window: int,
    truncate: bool,
    max_tokens: int | None,
    vocabulary: int,
) -> Iterator[list[int]]:
    """Token ids of texts in pieces of at most `window` + 1; see `measure`."""
    total = 0
    for text in texts:
        ids = check_ids(tokenizer(text, verbose=False)["input_ids"], tokenizer, vocabulary)
        # each piece repeats one token, so that its first prediction has a context
        pieces = [ids[start : start + window + 1] for start in range(0, len(ids) - 1, window)]
        for piece in pieces[: 1 if truncate else None]:
            yield piece
            total += len(piece) - 1
            if max_tokens and total >= max_tokens:
                return


def _blocks(windows: Iterator[list[int]]) -> Iterator[list[list[int]]]:
    """Lists of windows of about `BLOCK_TOKENS` together."""
    block: list[list[int]] = []
    for window in windows:
        block.append(window)
        if sum(map(len, block)) >= BLOCK_TOKENS:
            yield block
            block = []
    if block:
        yield block


def batches(windows: list[list[int]]) -> list[Tensor]:
    """Windows of like length together, padded with −100, about `BATCH_TOKENS` a batch."""
    batches: list[Tensor] = []
    ordered = sorted(windows, key=len, reverse=True)
    while ordered:
        width = len(ordered[0])
        count = max(1, BATCH_TOKENS // width)
        rows = [row + [-100] * (width - len(row)) for row in ordered[:count]]
        batches.append(torch.tensor(rows))
        del ordered[:count]
    return batches
