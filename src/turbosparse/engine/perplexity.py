"""Perplexity and sparsity of a packed model, as the engine runs it: what quantising costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from turbosparse.base.errors import TurboSparseError
from turbosparse.base.progress import track
from turbosparse.engine.engine import Engine
from turbosparse.engine.scoring import log_probabilities
from turbosparse.hf.count import experts_in_use


@dataclass(frozen=True)
class PackedAnalysis:
    """What `analyse` found in a packed folder; ratios are shares of neurons in use."""

    ran: str
    tokens: int
    nats_per_token: dict[str, float]
    perplexity: dict[str, float]
    activation_sparsity: float
    sparsity: list[float]  # [layer]

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Column, Table

        title = f"{self.tokens} held-out tokens"
        corpora = Table(Column("corpus", overflow="fold"), "nats/token", "perplexity", title=title)
        for corpus, nats in self.nats_per_token.items():
            corpora.add_row(corpus, f"{nats:.4f}", f"{self.perplexity[corpus]:.3f}")
        layers = Table("layer", "sparsity", title=f"activation sparsity {self.sparse_share}")
        for layer, sparsity in enumerate(self.sparsity):
            layers.add_row(str(layer), f"{sparsity:.2%}")
        return Group(self.ran, corpora, layers)

    @property
    def sparse_share(self) -> str:
        return f"{self.activation_sparsity:.2%} (exact zeros)"


def measure_packed(engine: Engine, corpora: Mapping[str, Iterable[list[int]]]) -> PackedAnalysis:
    """Score windows of token ids; every token but the first of a window is predicted.

    Raises:
        TurboSparseError: a corpus gives no token to predict.
    """
    active = np.zeros(engine.config.num_hidden_layers)
    nats: dict[str, float] = {}
    predicted: dict[str, int] = {}
    for corpus, windows in corpora.items():
        nats[corpus], predicted[corpus] = 0.0, 0
        for ids in track(windows, corpus):
            done = 0
            for logits, used in engine.read(ids[:-1]):
                targets = ids[1 + done : 1 + done + len(logits)]
                nats[corpus] -= float(log_probabilities(logits, targets).sum())
                active += used[..., 2].sum(1)
                done += len(logits)
            predicted[corpus] += done
        if not predicted[corpus]:
            raise TurboSparseError(f"corpus {corpus!r} holds no document of two tokens or more")
    tokens = sum(predicted.values())
    in_use = tokens * engine.config.intermediate_size * experts_in_use(engine.config)
    sparsity = 1 - active / in_use
    mean = {corpus: nats[corpus] / predicted[corpus] for corpus in nats}
    return PackedAnalysis(
        ran=engine.describe(),
        tokens=tokens,
        nats_per_token=mean,
        perplexity={corpus: math.exp(min(value, 709)) for corpus, value in mean.items()},
        activation_sparsity=float(sparsity.mean()),
        sparsity=sparsity.tolist(),
    )
