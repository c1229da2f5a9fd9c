"""What a predictor gets right: recall, density, and the threshold that gives a recall."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from turbosparse.predictors.mask import Scorer
from turbosparse.predictors.rows import Feed

MOST = 4096  # tokens that a threshold is found on, and that it is measured on
_ALL = -1e30


class Recall(NamedTuple):
    """Of one feed-forward, sums over its tokens."""

    tokens: float
    adding: float  # tokens with an active neuron
    found: float  # active candidates
    active: float
    norm: float  # what the candidates add, of 1 for each of those
    candidates: float
    gate: float  # positive gates
    gate_found: float  # of candidates

    def plus(self, other: Recall) -> Recall:
        return Recall(*(a + b for a, b in zip(self, other, strict=True)))

    def share(self, neurons: int) -> float:
        """Of the neurons that are active."""
        return self.active / max(1, self.tokens * neurons)

    def shares(self, neurons: int) -> dict[str, float]:
        """As `Predictor` has them; of a feed-forward of so many neurons."""
        return {
            "recall": self.found / max(1, self.active),
            "norm_recall": self.norm / max(1, self.adding),
            "density": self.candidates / max(1, self.tokens * neurons),
        }


class Seen(NamedTuple):
    """Tokens of a feed-forward: its scores, positive gates and shares of the output, ``[N, I]``."""

    scores: Tensor
    gate: Tensor
    shares: Tensor
    slack: float  # half the least difference of two scores, against rounding

    @classmethod
    def of(cls, feed: Feed, scorer: Scorer, most: int = MOST) -> Seen:
        parts = []
        for rows in feed.batches(most):
            x, h = feed.rows(rows)
            gate, active = feed.active(x)
            parts.append((scorer.scores(h), gate, feed.shares(active)))
        slack = 1 / x.shape[1] if scorer.kind == "sign" else 0.0
        scores, gate, shares = (torch.cat(part) for part in zip(*parts, strict=True))
        return cls(scores, gate, shares, slack)

    def threshold(self, target: float) -> float:
        """The highest at which candidates add this share of the output, mean over tokens.

        Without an active neuron nothing tells, and all are candidates.
        """
        active = self.shares > 0
        scores, order = self.scores[active].sort(descending=True)
        if not len(scores):
            return _ALL
        carried = self.shares[active][order].double().cumsum(0)
        last = int((carried < target * carried[-1]).sum())
        return float(scores[min(last, len(scores) - 1)]) - self.slack

    def recall(self, threshold: float) -> Recall:
        picked, active = self.scores >= threshold, self.shares > 0
        sums = (
            active.any(-1).sum(),
            (picked & active).sum(),
            active.sum(),
            (self.shares * picked).sum(),
            picked.sum(),
            self.gate.sum(),
            (self.gate & picked).sum(),
        )
        return Recall(float(len(picked)), *(float(part) for part in sums))
