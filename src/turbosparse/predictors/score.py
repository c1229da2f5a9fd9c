"""What a predictor costs: perplexity and recall on held-out text at several thresholds.

The model runs layer by layer, several times side by side: without the predictor, with it at the
thresholds that it has, and at those that reach each of some norm recalls.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from turbosparse.base.errors import TurboSparseError
from turbosparse.base.progress import track
from turbosparse.hf import families
from turbosparse.hf.change import mask_combined
from turbosparse.hf.count import Use
from turbosparse.hf.layerwise import Layerwise
from turbosparse.ops import cost
from turbosparse.ops.predictor import Predictor
from turbosparse.predictors.mask import Scorer, scorers
from turbosparse.predictors.measure import Recall, Seen
from turbosparse.predictors.rows import feeds

CALIBRATED = 4  # every fourth sequence is for the thresholds, the others are measured
_KNOWS = 0.2  # of what chance leaves, a predictor finds at least this share
_HEAD_TOKENS = 512  # whose logits are in memory together


@dataclass
class Run:
    """The model with its predictor at some thresholds.

    `thresholds` and `recalls` are ``[layer][expert]``, of the states of the model without it.
    """

    target: float | None  # norm recall; None: the thresholds are those of the folder
    thresholds: list[list[float]] = field(default_factory=list)
    recalls: list[list[Recall]] = field(default_factory=list)
    nats: float = 0.0  # sums over the predicted tokens
    kl: float = 0.0

    def total(self) -> Recall:
        return reduce(Recall.plus, (one for layer in self.recalls for one in layer))

    def check(self, where: Path, about: Predictor, neurons: int) -> None:
        """Raise if the predictor knows little more of the neurons than chance does."""
        measured = self.total().shares(neurons)
        recall, density = measured["recall"], measured["density"]
        if recall < density + _KNOWS * (1 - density):
            raise TurboSparseError(
                f"{where}: the predictor finds {recall:.1%} of the active neurons among "
                f"{density:.1%} of all, little more than chance; it is of another model, or reads "
                f'another input than {about.input}: see "input" of the block "predictor" in '
                "config.json, or give pack --predictor-input"
            )


@torch.no_grad()
def run_layers(
    model: Layerwise, about: Predictor, ids: Tensor, targets: list[float]
) -> tuple[float, int, list[Run]]:
    """Run text through the model with and without its predictor.

    Args:
        model: with a predictor in its folder.
        about: the record of that.
        ids: token ids of held-out text, ``[N, T]``.
        targets: norm recalls.

    Returns:
        The nats of the model without its predictor, summed up; the tokens that were predicted; and
        the runs with it.
    """
    runs = [Run(None), *map(Run, targets)]
    hidden = model.embed(ids)
    measured = torch.arange(len(ids)) % CALIBRATED > 0
    states = [hidden[measured] for _ in runs]
    for index in track(range(model.config.num_hidden_layers), "scoring layers"):
        shell = model.layer(index)
        each = scorers(model.checkpoint, model.config, about, index)
        model.attend(shell, hidden)
        _look(model, shell, each, hidden, measured, runs)
        model.feed_forward(shell, hidden)
        for run, state in zip(runs, states, strict=True):
            _masked(model, shell, each, run.thresholds[-1], state)
    nats = _compare(model, ids[measured], hidden[measured], states, runs)
    return nats, int(measured.sum()) * (ids.shape[1] - 1), runs


def _look(
    model: Layerwise,
    shell: Any,
    each: list[Scorer],
    residual: Tensor,
    measured: Tensor,
    runs: list[Run],
) -> None:
    """Find the thresholds of a layer for all runs, and measure them on the other sequences."""
    for run in runs:
        run.thresholds.append([])
        run.recalls.append([])
    measured = measured[:, None].expand(residual.shape[:2]).flatten()
    for scorer, feed in zip(each, feeds(model, shell, residual, each[0].reads), strict=True):
        first, rest = (Seen.of(feed.only(part), scorer) for part in (~measured, measured))
        for run in runs:
            own = scorer.threshold if run.target is None else first.threshold(run.target)
            run.thresholds[-1].append(own)
            run.recalls[-1].append(rest.recall(own))


def _masked(
    model: Layerwise, shell: Any, each: list[Scorer], thresholds: list[float], state: Tensor
) -> None:
    own = [s._replace(threshold=t) for s, t in zip(each, thresholds, strict=True)]

    def pick(_: int, expert: int | None, x: Tensor, residual: Tensor) -> Tensor:
        return own[expert or 0].pick(x, residual)

    model.attend(shell, state)
    with mask_combined(SimpleNamespace(model=shell), pick):
        model.feed_forward(shell, state)


def _compare(
    model: Layerwise, ids: Tensor, hidden: Tensor, states: list[Tensor], runs: list[Run]
) -> float:
    """Add up nats and divergence of each run; returns the nats without a predictor."""
    total, step = 0.0, max(1, _HEAD_TOKENS // ids.shape[1])
    for at in range(0, len(ids), step):
        part = slice(at, at + step)
        wanted = ids[part, 1:].flatten()

        def logits(state: Tensor, part: slice = part) -> Tensor:
            return model.head(model.norm(state[part, :-1])).flatten(0, 1).float().log_softmax(-1)

        truth = logits(hidden)
        total += float(cross_entropy(truth, wanted, reduction="sum"))
        for run, state in zip(runs, states, strict=True):
            found = logits(state)
            run.nats += float(cross_entropy(found, wanted, reduction="sum"))
            run.kl += float(kl_div(found, truth, reduction="sum", log_target=True))
    return total


def bytes_of(config: Any, about: Predictor, recall: Recall, quant: str) -> tuple[float, float]:
    """What a token reads of a feed-forward ÷ what exact mode does, and the predictor ÷ its weights.

    Gate, up and down are in `quant`.
    """
    each = recall.tokens * config.intermediate_size
    weigh = cost.bytes_of(dict.fromkeys(families.FFN_ROLES, quant), about)

    def read(mode: str, gate: float, active: float) -> dict[str, float]:
        use = Use(1, *(part / each for part in (recall.candidates, gate, active)))
        parts = cost.needed(config, weigh, mode, use, about)
        return {name: parts[name] for name in ("gates", "ups", "downs", "predictors")}

    predicted = read("predicted", recall.gate_found, recall.found)
    exact, dense = (sum(read(m, recall.gate, recall.active).values()) for m in ("exact", "dense"))
    return sum(predicted.values()) / exact, predicted["predictors"] / dense
