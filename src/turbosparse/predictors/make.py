"""Predictors for all feed-forwards of a model, made layer by layer on text.

In memory are one layer, the hidden states of the text, and a bit for each of its tokens and neurons
of the layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from turbosparse.base.errors import TurboSparseError
from turbosparse.hf import families
from turbosparse.hf.activations import ACTIVATIONS
from turbosparse.hf.layerwise import Layerwise
from turbosparse.hf.load import activation_of
from turbosparse.hf.steps import Steps
from turbosparse.predictors.fit import by_svd, train
from turbosparse.predictors.mask import Scorer
from turbosparse.predictors.measure import Recall, Seen
from turbosparse.predictors.rows import Feed, feeds

HELD_OUT = 8  # every eighth sequence is kept apart, for the threshold
BLOCK = 32  # ranks are multiples of it, so that they can be quantised


class How(NamedTuple):
    """The settings of `predictor.train` that the result depends on."""

    kind: str  # lowrank, svd or sign
    reads: str
    rank: int | None  # of lowrank and svd
    carry: float
    recall: float
    epochs: int
    seed: int


def make_layers(model: Layerwise, ids: Tensor, work: Path, how: How) -> list[Any]:
    """Make the predictor of every layer, and keep it in `work`; resume if some are there.

    Args:
        model: a sparse model.
        ids: token ids of text, ``[N, T]``.
        work: folder of this pass, with a shard of each layer (`steps.shard_name`).
        how: the settings.

    Returns:
        For each layer and expert its threshold and a `Recall`, on text kept apart.

    Raises:
        TurboSparseError: `work` holds a pass with other settings.
    """
    steps = Steps(work, model, ids, how._asdict(), "training of predictors")
    hidden = steps.hidden()
    held_out = torch.arange(len(ids)) % HELD_OUT == HELD_OUT - 1
    held_out = held_out[:, None].expand(ids.shape).flatten()
    for index in steps.left("making predictors"):
        shell = model.layer(index)
        model.attend(shell, hidden)
        made: dict[str, Tensor] = {}
        about = []
        for number, feed in enumerate(feeds(model, shell, hidden, how.reads)):
            expert = number if families.experts(model.config) else None
            scorer, measured = _make(feed, held_out, how, how.seed + 1000 * index + number)
            about.append(measured)
            if how.rank:
                made |= _named(model, (index, expert), scorer.parts)
        model.feed_forward(shell, hidden)
        del shell
        steps.finish(made, hidden, about)
    return steps.about


def rank_of(config: Any, share: float) -> int:
    """The rank at which a predictor has this share of the weights of its feed-forward."""
    hidden, neurons = config.hidden_size, config.intermediate_size
    parts = len(ACTIVATIONS[activation_of(config)].parts)
    rank = int(share * parts * hidden * neurons / (hidden + neurons)) // BLOCK * BLOCK
    if not rank:
        least = BLOCK * (hidden + neurons) / (parts * hidden * neurons)
        raise TurboSparseError(
            f"--share {share:g}: the least predictor of this model, of rank {BLOCK}, has "
            f"{least:.1%} of the weights of a feed-forward; give at least {least:.3f}"
        )
    return rank


def _make(feed: Feed, held_out: Tensor, how: How, seed: int) -> tuple[Scorer, dict[str, Any]]:
    """The predictor of one feed-forward; its threshold and recall on the text kept apart."""
    seen, unseen = feed.only(~held_out), feed.only(held_out)
    scorer = _scorer(seen, how, seed)
    apart = Seen.of(unseen if len(unseen) else seen, scorer)
    threshold = apart.threshold(how.recall)
    recall: Recall = apart.recall(threshold)
    return scorer, {"threshold": threshold, "recall": recall}


def _scorer(feed: Feed, how: How, seed: int) -> Scorer:
    if how.rank is None:
        return Scorer.of_signs(feed.decides())
    parts = by_svd(feed, how.rank)
    if how.kind == "lowrank":
        parts = train(feed, feed.labels(how.carry), parts, epochs=how.epochs, seed=seed)
    return Scorer("low_rank", how.reads, parts)


def _named(
    model: Layerwise, slot: tuple[int, int | None], parts: tuple[Tensor, ...]
) -> dict[str, Tensor]:
    name = families.table(model.config).name
    stored = model.checkpoint[name("norm")].dtype
    return {
        name(role, *slot): part.to("cpu", stored).contiguous()
        for role, part in zip(("fc1", "fc2"), parts, strict=True)
    }
