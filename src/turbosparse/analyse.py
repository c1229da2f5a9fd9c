"""Stage 3: what happens inside a model: perplexity, sparsity, and how often each neuron fires.

Reads a model folder, dense or sparse, and a held-out corpus; writes ``stats.turbosparse``, from
which `pack` learns the hot neurons, to put them first, and how much each column of a matrix matters
to its quantisation. Sparsity counts exact zeros of Combined, so a SwiGLU model
honestly shows none.

    turbosparse analyse mistral-sparse --data held_out.jsonl
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from turbosparse.base.errors import TurboSparseError
from turbosparse.base.folders import AnyPath, local_path
from turbosparse.base.machine import memory_available
from turbosparse.base.progress import note, track
from turbosparse.engine.engine import Engine
from turbosparse.engine.perplexity import PackedAnalysis, measure_packed
from turbosparse.hf.activations import WITHOUT_ZEROS, Activation
from turbosparse.hf.checkpoint import shard_files
from turbosparse.hf.hub import model_folder
from turbosparse.hf.layerwise import Layerwise
from turbosparse.hf.load import (
    activation_of,
    check_ids,
    load_model,
    load_tokenizer,
    threshold_of,
)
from turbosparse.hf.observe import See, SeeInput, observe_ffn, observe_inputs
from turbosparse.packed.format import is_packed
from turbosparse.packed.stats import FILE, Stats
from turbosparse.training.readers import documents, take_last

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["float32", "bfloat16", "float16"]
BATCH_TOKENS = 2048
BLOCK_TOKENS = 65_536  # of a corpus that are in memory together
NEAR = (0.01, 0.03, 0.1)  # parts of a token's largest Combined
MEMORY_SHARE = 0.6  # of the available memory that a model may take to be loaded whole


@dataclass(frozen=True)
class Analysis:
    """What `analyse` found; ratios are shares of neurons in use."""

    out: str
    activation: str
    tokens: int
    nats_per_token: dict[str, float]
    perplexity: dict[str, float | None]  # None beyond what a float holds
    activation_sparsity: float
    sparsity_of: dict[str, float]  # of each corpus
    sparsity: list[list[float]]  # [layer][expert]
    gate_positive: list[list[float]]
    expert_share: list[list[float]]
    dead_neurons: list[list[int]]
    hot_share: list[list[float]]  # of neurons that make 80 % of the activations, [layer][expert]
    near_zero: dict[str, float]  # see `Stats.near_zero`

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Column, Table

        corpora = Table(
            Column("corpus", overflow="fold"),
            "nats/token",
            "perplexity",
            "sparsity",
            title=f"{self.tokens} held-out tokens",
        )
        for corpus, nats in self.nats_per_token.items():
            corpora.add_row(
                corpus,
                f"{nats:.4f}",
                f"{self.perplexity[corpus] or math.inf:.3f}",
                f"{self.sparsity_of[corpus]:.2%}",
            )
        title = (
            f"{self.activation}: activation sparsity {self.activation_sparsity:.2%} (exact zeros)"
        )
        moe = len(self.sparsity[0]) > 1
        first = ["layer", "expert", "tokens"] if moe else ["layer"]
        layers = Table(*first, "sparsity", "gate > 0", "never active", "hot", title=title)
        layers.caption = "hot: the share of neurons that makes 80 % of the activations"
        for layer, row in enumerate(self.sparsity):
            for expert, sparsity in enumerate(row):
                where = [str(layer), str(expert), f"{self.expert_share[layer][expert]:.1%}"]
                layers.add_row(
                    *(where if moe else where[:1]),
                    f"{sparsity:.2%}",
                    f"{self.gate_positive[layer][expert]:.2%}",
                    str(self.dead_neurons[layer][expert]),
                    f"{self.hot_share[layer][expert]:.1%}",
                )
        near = [
            f"{share:.1%} of Combined is below {float(part):.0%} of its token's largest entry"
            for part, share in self.near_zero.items()
        ]
        return Group(corpora, layers, *near, f"statistics: {self.out}")


def analyse(
    model: str,
    *,
    data: Sequence[AnyPath],
    out: AnyPath | None = None,
    template: str = "{text}",
    separator: str | None = None,
    last: int | None = None,
    window: int | None = None,
    truncate: bool = False,
    max_tokens: int | None = None,
    activation: Activation | None = None,
    device: Device = "auto",
    dtype: Dtype | None = None,
) -> Analysis | PackedAnalysis:
    """Measure perplexity and activation sparsity on a held-out corpus.

    A packed folder is run by the engine, in the mode that `generate` would take: beside the model
    that it was packed from, that shows what quantising costs. It gives no statistics file.

    Parameters
    ----------
    model
        Model folder (dense or sparse), packed folder, GGUF file or hub id.
    data
        Text, JSON-lines or .gz file, or a folder of them; repeat it to measure several corpora side
        by side.
    out
        Folder for stats.turbosparse; by default the model folder, where `pack` looks for it.
    template
        How a JSON row becomes text, such as "{question} {answer}".
    separator
        Text between the documents of a text file; without it a file is one document.
    last
        Use only the last documents of each corpus, this many.
    window
        Tokens of context at most; by default the model's own, up to 1024.
    truncate
        Measure only the first window of each document, as many published numbers do.
    max_tokens
        Stop each corpus after about this many tokens.
    activation
        Run the weights with this FFN activation instead of the folder's own.
    device
        auto takes a GPU if there is one. A model larger than the memory runs layer by layer.
    dtype
        By default the type that the weights are stored in.
    """
    sources = [local_path(source) for source in data]
    _check(sources, last=last, window=window, max_tokens=max_tokens)
    folder = model_folder(model)
    corpora = {
        str(source): take_last(found, last) if last else found
        for source in sources
        for found in [documents(source, template=template, separator=separator)]
    }
    if is_packed(folder):
        return _analyse_packed(folder, corpora, window, truncate, max_tokens)
    if out is None and folder != local_path(model):
        raise TurboSparseError(
            f"{model} is not a local folder: say with --out where the statistics go"
        )
    path = local_path(out or folder) / FILE
    _check_writable(path)
    network = _open(folder, activation, device, dtype)
    stats = measure(
        network,
        load_tokenizer(folder),
        corpora,
        window=window,
        truncate=truncate,
        max_tokens=max_tokens,
    )
    stats.about["model"] = str(model)
    try:
        stats.save(path)
    except OSError as error:  # the figures are worth more than the file
        note(f"cannot write {path} ({error.strerror}): the statistics are only printed")
    return summarise(stats, str(path))


def _analyse_packed(
    folder: Path,
    corpora: dict[str, Any],
    window: int | None,
    truncate: bool,
    max_tokens: int | None,
) -> PackedAnalysis:
    engine, tokenizer = Engine(folder), load_tokenizer(folder)
    width = min(window or 1024, engine.context)
    vocabulary = engine.config.vocab_size
    return measure_packed(
        engine,
        {
            corpus: _windows(tokenizer, texts, width, truncate, max_tokens, vocabulary)
            for corpus, texts in corpora.items()
        },
    )


def _check(
    data: list[Path], *, last: int | None, window: int | None, max_tokens: int | None
) -> None:
    if not data:
        raise TurboSparseError("give --data, a file or folder of held-out text")
    for flag, value in {"last": last, "window": window, "max-tokens": max_tokens}.items():
        if value is not None and value < 1:
            raise TurboSparseError(f"--{flag} is {value}; give at least 1, or leave it out")


def _check_writable(path: Path) -> None:
    """Before an hour of measuring: that the statistics can be written afterwards."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path.parent) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise TurboSparseError(
            f"cannot write {path} ({error.strerror}); choose another folder with --out"
        ) from error


def _open(folder: Path, activation: Activation | None, device: Device, dtype: Dtype | None) -> Any:
    """The model whole if it fits, else one layer at a time."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = getattr(torch, dtype) if dtype else None
    size = sum(shard.stat().st_size for shard in shard_files(folder))
    room = memory_available() if device == "cpu" else torch.cuda.mem_get_info()[0]
    if size > MEMORY_SHARE * room:
        note(f"{size / 1e9:.1f} GB of weights do not fit in memory: running layer by layer")
        return Layerwise(folder, activation=activation, device=device, dtype=kind)
    return load_model(folder, activation=activation, dtype=kind).to(device)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no infinity


def summarise(stats: Stats, out: str) -> Analysis:
    """The figures of `stats` for people and for JSON."""
    share = stats.tokens / stats.tokens.sum(-1, keepdim=True).clamp(min=1)
    return Analysis(
        out=out,
        activation=stats.about["activation"],
        tokens=sum(stats.predicted.values()),
        nats_per_token={corpus: stats.nats_per_token(corpus) for corpus in stats.nats},
        perplexity={corpus: _finite(stats.perplexity(corpus)) for corpus in stats.nats},
        activation_sparsity=stats.activation_sparsity(),
        sparsity_of=stats.sparsity,
        sparsity=(1 - stats.active_ratio()).tolist(),
        gate_positive=stats.gate_ratio().tolist(),
        expert_share=share.tolist(),
        dead_neurons=(stats.active == 0).sum(-1).tolist(),
        hot_share=stats.hot_share(),
        near_zero=stats.near_zero,
    )


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
    stats.about["activation"] = activation_of(config)
    near = _NearZero() if stats.about["activation"] in WITHOUT_ZEROS else None
    for corpus, texts in corpora.items():
        before = stats.active.clone(), stats.gate_positive.clone(), stats.tokens.clone()
        stats.nats[corpus], stats.predicted[corpus] = 0.0, 0
        windows = _windows(tokenizer, texts, window, truncate, max_tokens, config.vocab_size)
        for block in _blocks(windows):
            for ids, logits in _logits(model, stats, near, track(_batches(block), corpus)):
                nats = cross_entropy(
                    logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum"
                )
                stats.nats[corpus] += float(nats)
                stats.predicted[corpus] += int((ids[:, 1:] >= 0).sum())
        if not stats.predicted[corpus]:
            raise TurboSparseError(f"corpus {corpus!r} holds no document of two tokens or more")
        if not math.isfinite(stats.nats[corpus]):
            raise TurboSparseError(
                f"the loss on {corpus} is {stats.nats[corpus]}: the model has weights that are NaN "
                "or infinite, or that overflow; check them, or measure with --dtype float32"
            )
        active, gate, tokens = before
        own = Stats(stats.active - active, stats.gate_positive - gate, stats.tokens - tokens)
        stats.sparsity[corpus] = own.activation_sparsity()
    stats.near_zero = near.shares() if near else {}
    return stats


def _logits(
    model: Any, stats: Stats, near: _NearZero | None, batches: Iterable[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each batch with its logits; neurons are counted on the way."""
    if isinstance(model, Layerwise):
        yield from _layer_by_layer(model, stats, near, list(batches))
        return
    model.eval()
    for ids in batches:
        inputs = ids[:, :-1].clamp(min=0).to(model.device)
        see = _counting(stats, near, ids, model.config)
        with observe_ffn(model, see), observe_inputs(model, _squaring(stats, ids)):
            yield ids, model(inputs, use_cache=False).logits.cpu()


def _layer_by_layer(
    model: Layerwise, stats: Stats, near: _NearZero | None, batches: list[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    hidden = [model.embed(ids[:, :-1].clamp(min=0)) for ids in batches]
    for index in track(range(model.config.num_hidden_layers), "layers"):
        shell = model.layer(index)
        for number, ids in enumerate(batches):
            see = _counting(stats, near, ids, model.config, index)
            layer = SimpleNamespace(model=shell, config=model.config)
            with observe_ffn(layer, see), observe_inputs(layer, _squaring(stats, ids, index)):
                hidden[number] = model.run(shell, hidden[number])
    for ids, states in zip(batches, hidden, strict=True):
        normed = model.norm(states)
        _squaring(stats, ids)("head", 0, normed.flatten(0, -2))
        yield ids, model.head(normed)


def _counting(
    stats: Stats, near: _NearZero | None, ids: Tensor, config: Any, first: int = 0
) -> See:
    """Count the neurons that fire at the inputs of predicted tokens; padding is left out."""
    real, threshold = (ids[:, 1:] >= 0).flatten(), threshold_of(config)

    def see(layer: int, expert: int | None, gate: Tensor, active: Tensor, rows: Tensor) -> None:
        keep = real.to(rows.device)[rows]
        at = first + layer, expert or 0
        active = active[keep]
        stats.active[at] += (active != 0).sum(0).cpu()
        stats.gate_positive[at] += (gate[keep] > threshold).sum(0).cpu()
        stats.tokens[at] += int(keep.sum())
        if near:
            near.see(active)

    return see


def _squaring(stats: Stats, ids: Tensor, first: int = 0) -> SeeInput:
    """Sum the squares of what matrices read of predicted tokens; padding is left out."""
    real = (ids[:, 1:] >= 0).flatten()

    def see(kind: str, layer: int, x: Tensor) -> None:
        squares = x[real.to(x.device)].float().square().sum(0)
        stats.squares[kind][first + layer] += squares.cpu()

    return see


class _NearZero:
    """How many entries of Combined are small beside the largest of their token."""

    def __init__(self) -> None:
        self.counts, self.entries = torch.zeros(len(NEAR)), 0

    def see(self, active: Tensor) -> None:
        size = active.abs().float()
        largest = size.amax(-1, keepdim=True)
        self.counts += torch.stack([(size < part * largest).sum().cpu() for part in NEAR])
        self.entries += size.numel()

    def shares(self) -> dict[str, float]:
        return {
            f"{part:g}": float(count) / max(1, self.entries)
            for part, count in zip(NEAR, self.counts, strict=True)
        }


def _windows(
    tokenizer: Any,
    texts: Iterable[str],
    window: int,
    truncate: bool,
    max_tokens: int | None,
    vocabulary: int,
) -> Iterator[list[int]]:
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
