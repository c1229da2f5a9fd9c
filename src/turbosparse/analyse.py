"""Stage 3: what happens inside a model: perplexity, sparsity, and how often each neuron fires.

Reads a model folder, dense or sparse, and a held-out corpus; writes ``stats.safetensors``, which
`pack` uses to put the hot neurons first. Sparsity counts exact zeros of Combined, so a SwiGLU model
honestly shows none.

    turbosparse analyse mistral-sparse --data held_out.jsonl
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from turbosparse.base.errors import TurboSparseError
from turbosparse.base.progress import track
from turbosparse.hf.hub import model_folder
from turbosparse.hf.load import activation_of, load_model, load_tokenizer
from turbosparse.hf.observe import observe_ffn
from turbosparse.packed.stats import FILE, Stats
from turbosparse.training.readers import documents, take_last

BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Analysis:
    """What `analyse` found; ratios are shares of neurons in use."""

    out: str
    activation: str
    tokens: int
    nats_per_token: dict[str, float]
    perplexity: dict[str, float]
    activation_sparsity: float
    sparsity: list[list[float]]  # [layer][expert]
    gate_positive: list[list[float]]
    expert_share: list[list[float]]
    dead_neurons: list[list[int]]

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Column, Table

        corpora = Table(
            Column("corpus", overflow="fold"),
            "nats/token",
            "perplexity",
            title=f"{self.tokens} held-out tokens",
        )
        for corpus, nats in self.nats_per_token.items():
            corpora.add_row(corpus, f"{nats:.4f}", f"{self.perplexity[corpus]:.3f}")
        title = (
            f"{self.activation}: activation sparsity {self.activation_sparsity:.2%} (exact zeros)"
        )
        moe = len(self.sparsity[0]) > 1
        first = ["layer", "expert", "tokens"] if moe else ["layer"]
        layers = Table(*first, "sparsity", "gate > 0", "never active", title=title)
        for layer, row in enumerate(self.sparsity):
            for expert, sparsity in enumerate(row):
                where = [str(layer), str(expert), f"{self.expert_share[layer][expert]:.1%}"]
                layers.add_row(
                    *(where if moe else where[:1]),
                    f"{sparsity:.2%}",
                    f"{self.gate_positive[layer][expert]:.2%}",
                    str(self.dead_neurons[layer][expert]),
                )
        return Group(corpora, layers, f"statistics: {self.out}")


def analyse(
    model: str,
    *,
    data: list[Path],
    out: Path | None = None,
    template: str = "{text}",
    separator: str | None = None,
    last: int | None = None,
    window: int | None = None,
    truncate: bool = False,
    max_tokens: int | None = None,
) -> Analysis:
    """Measure perplexity and activation sparsity on a held-out corpus.

    Parameters
    ----------
    model
        Model folder (dense or sparse) or hub id.
    data
        Text, JSON-lines or .gz file, or a folder of them; repeat it to measure several corpora side
        by side.
    out
        Folder for stats.safetensors; by default the model folder, where `pack` looks for it.
    template
        How a JSON row becomes text, such as "{question} {answer}".
    separator
        Text between the documents of a text file; without it a file is one document.
    last
        Use only the last documents of each corpus: so many.
    window
        Tokens of context at most; by default the model's own, up to 1024.
    truncate
        Measure only the first window of each document, as many published numbers do.
    max_tokens
        Stop each corpus after about so many tokens.
    """
    folder = model_folder(model)
    if out is None and folder != Path(model).expanduser():
        raise TurboSparseError(
            f"{model} is a model of the hub: say with --out where the statistics go"
        )
    network, tokenizer = load_model(folder), load_tokenizer(folder)
    corpora = {
        str(path): take_last(documents(path, template=template, separator=separator), last)
        for path in data
    }
    stats = measure(
        network, tokenizer, corpora, window=window, truncate=truncate, max_tokens=max_tokens
    )
    stats.about["model"] = str(model)
    path = (out or folder) / FILE
    stats.save(path)
    return summarise(stats, str(path))


def summarise(stats: Stats, out: str) -> Analysis:
    """The figures of `stats` for people and for JSON."""
    share = stats.tokens / stats.tokens.sum(-1, keepdim=True).clamp(min=1)
    return Analysis(
        out=out,
        activation=stats.about["activation"],
        tokens=sum(stats.predicted.values()),
        nats_per_token={corpus: stats.nats_per_token(corpus) for corpus in stats.nats},
        perplexity={corpus: stats.perplexity(corpus) for corpus in stats.nats},
        activation_sparsity=stats.activation_sparsity(),
        sparsity=(1 - stats.active_ratio()).tolist(),
        gate_positive=stats.gate_ratio().tolist(),
        expert_share=share.tolist(),
        dead_neurons=(stats.active == 0).sum(-1).tolist(),
    )


@torch.inference_mode()
def measure(
    model: Any,
    tokenizer: Any,
    corpora: dict[str, list[str]],
    *,
    window: int | None = None,
    truncate: bool = False,
    max_tokens: int | None = None,
) -> Stats:
    """Run `model` over each corpus and count.

    Every token but the first of a document is predicted once, from at most `window` tokens before
    it; with `truncate` only those of the document's first window.

    Raises:
        TurboSparseError: a corpus gives no token to predict.
    """
    config = model.config
    window = min(window or 1024, config.max_position_embeddings)
    stats = Stats.empty(config)
    stats.about["activation"] = activation_of(config)
    model.eval()
    for corpus, texts in corpora.items():
        windows = _windows(tokenizer, texts, window, truncate, max_tokens)
        if not windows:
            raise TurboSparseError(f"corpus {corpus!r} holds no document of two tokens or more")
        stats.nats[corpus], stats.predicted[corpus] = 0.0, 0
        for ids in track(_batches(windows), corpus):
            with _counting(model, stats, ids):
                logits = model(ids[:, :-1].clamp(min=0), use_cache=False).logits
            nats = cross_entropy(
                logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum"
            )
            stats.nats[corpus] += float(nats)
            stats.predicted[corpus] += int((ids[:, 1:] >= 0).sum())
    return stats


def _counting(model: Any, stats: Stats, ids: Tensor) -> Any:
    """Count the neurons that fire at the inputs of predicted tokens; padding is left out."""
    real = (ids[:, 1:] >= 0).flatten()

    def see(layer: int, expert: int | None, gate: Tensor, active: Tensor, rows: Tensor) -> None:
        keep = real[rows]
        stats.active[layer, expert or 0] += (active[keep] != 0).sum(0)
        stats.gate_positive[layer, expert or 0] += (gate[keep] > 0).sum(0)
        stats.tokens[layer, expert or 0] += int(keep.sum())

    return observe_ffn(model, see)


def _windows(
    tokenizer: Any, texts: Iterable[str], window: int, truncate: bool, max_tokens: int | None
) -> list[list[int]]:
    windows: list[list[int]] = []
    total = 0
    for text in texts:
        ids = tokenizer(text, verbose=False)["input_ids"]
        # each piece repeats one token, so that its first prediction has a context
        pieces = [ids[start : start + window + 1] for start in range(0, len(ids) - 1, window)]
        for piece in pieces[: 1 if truncate else None]:
            windows.append(piece)
            total += len(piece) - 1
            if max_tokens and total >= max_tokens:
                return windows
    return windows


def _batches(windows: list[list[int]]) -> list[Tensor]:
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
