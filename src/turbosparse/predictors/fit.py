"""Ways to make a predictor: two matrices, trained or by a singular value decomposition.

A logit is ``fc2 · relu(fc1 · h)``. Shapes: N tokens, H hidden, I neurons, R rank.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, linear, relu

from turbosparse.predictors.rows import Feed, Labels

_BATCH = 512  # tokens of a step
_RATE = 2e-3  # learning rate at its highest
_RIDGE = 1e-3  # of the mean square of an input, so that little text can be whitened
_MISSES = 0.005  # added to the weight of inactive neurons, as Deja Vu does


def by_svd(feed: Feed, rank: int) -> tuple[Tensor, Tensor]:
    """fc1 and fc2 that give the sum of the matrices that decide, as well as their rank allows.

    Each is divided by the usual size of its neurons' products first.

    The decomposition is of the matrix times a root of the inputs' second moments, so that it is the
    products that come near, not the weights. A map without the relu takes two of its units for each
    dimension: ``v = relu(v) - relu(-v)``.
    """
    hidden, device = feed.residual.shape[1], feed.model.device
    moments = torch.zeros(hidden, hidden, device=device)
    outer = torch.zeros(len(feed.ffn.up), hidden, device=device)
    x, _ = feed.rows(next(feed.batches()))
    rows_of = [(row, linear(x, row).square().mean(0).sqrt()) for row in feed.decides()]
    decide = torch.stack([row / size[:, None] for row, size in rows_of]).sum(0)
    for rows in feed.batches():
        x, h = feed.rows(rows)
        moments.addmm_(h.T, h)
        outer.addmm_(linear(x, decide).T, h)
    moments.diagonal().add_(_RIDGE * moments.diagonal().mean().clamp(min=1e-20))
    root = torch.linalg.cholesky(moments)
    # the least squares map from h to the products, times the root
    whitened = torch.linalg.solve_triangular(root, outer.T, upper=False).T
    kept = min(rank // 2, hidden)
    right = torch.linalg.eigh(whitened.T @ whitened).eigenvectors.T.flip(0)[:kept]
    scale = math.sqrt(max(1, len(feed)))  # so that a unit is of size one
    down = torch.linalg.solve_triangular(root / scale, right, upper=False, left=False)
    up = whitened @ right.T / scale
    left_over = torch.zeros(rank - 2 * kept, hidden, device=device)  # beyond the hidden size
    fc1 = torch.cat([down, -down, left_over])
    return fc1, torch.cat([up, -up, up.new_zeros(len(up), len(left_over))], 1)


def train(
    feed: Feed, labels: Labels, first: tuple[Tensor, Tensor], *, epochs: int, seed: int
) -> tuple[Tensor, Tensor]:
    """fc1 and fc2 trained from `first` on, to tell the neurons of `labels` from the others."""
    if not len(feed):
        return first
    size = _sizes(feed)
    fc1, fc2 = (part.clone().requires_grad_() for part in (first[0] * size, first[1]))
    optimiser = torch.optim.AdamW([fc1, fc2], lr=_RATE, weight_decay=0.01)
    steps = epochs * math.ceil(len(feed) / _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _RATE, total_steps=steps + 1)
    random = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(feed), generator=random).split(_BATCH):
            h = feed.rows(rows)[1] / size
            wanted = labels.of(rows).to(h.device)
            logits = linear(relu(linear(h, fc1)), fc2)
            loss = loss_of(logits, wanted, labels.share).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return fc1.detach() / size, fc2.detach()


def loss_of(logits: Tensor, wanted: Tensor, share: Any) -> Tensor:
    """The loss of Deja Vu (arXiv 2310.17157) of each entry: cross-entropy, where those that are not
    wanted are weighted by the share of those that are, so that both kinds count about the same.
    """
    weight = torch.where(wanted, 1.0, share + _MISSES)
    return binary_cross_entropy_with_logits(logits, wanted.float(), weight=weight, reduction="none")


def _sizes(feed: Feed) -> Tensor:
    """Root mean square of each input, ``[H]``: divided by it, all learn at one rate."""
    _, h = feed.rows(next(feed.batches()))
    return h.square().mean(0).sqrt().clamp(min=1e-10)
