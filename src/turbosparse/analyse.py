"""Stage 3: what happens inside a model: perplexity, sparsity, and how often each neuron fires.

Reads a model folder, dense or sparse, and a held-out corpus; writes ``stats.turbosparse``, from
which `pack` learns the hot neurons, to put them first, and how much each column of a matrix matters
to its quantisation. Sparsity counts exact zeros of Combined, so a SwiGLU model
honestly shows none.

    turbosparse analyse mistral-sparse --data held_out.jsonl
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal

import torch

from turbosparse.analysis.curves import curves_of
from turbosparse.analysis.measure import measure, windows
from turbosparse.base.errors import TurboSparseError
from turbosparse.base.folders import AnyPath, local_path
from turbosparse.base.machine import Device, device_to_use, memory_available
from turbosparse.base.progress import note
from turbosparse.engine.engine import Engine
from turbosparse.engine.perplexity import PackedAnalysis, measure_packed
from turbosparse.hf.activations import Activation
from turbosparse.hf.checkpoint import shard_files
from turbosparse.hf.hub import model_folder
from turbosparse.hf.layerwise import Layerwise
from turbosparse.hf.load import load_config, load_model, load_tokenizer
from turbosparse.packed.format import is_packed
from turbosparse.packed.stats import FILE, Curves, Stats
from turbosparse.training.readers import documents, take_last

Dtype = Literal["float32", "bfloat16", "float16"]
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
    up_positive: list[list[float]]
    both_positive: list[list[float]]
    expert_share: list[list[float]]
    router_entropy: list[float]  # nats; 0 in a dense model
    dead_neurons: list[list[int]]
    hot_share: list[list[float]]  # of neurons that make 80 % of the activations, [layer][expert]
    overlap: list[float]  # of a token's neurons, those that the token before has too, [layer]
    window_share: dict[int, float]  # of a layer's neurons, those that so many tokens need together
    batch_share: dict[int, float]  # the same of tokens that stand far apart
    near_zero: dict[str, float]  # see `Stats.near_zero`
    curves: dict[str, Any] | None  # see `Curves`

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
        columns = ("sparsity", "gate > 0", "up > 0", "both", "never active", "hot")
        layers = Table(*first, *columns, title=title)
        layers.caption = "hot: the share of neurons that makes 80 % of the activations"
        for layer, row in enumerate(self.sparsity):
            for expert, sparsity in enumerate(row):
                where = [str(layer), str(expert), f"{self.expert_share[layer][expert]:.1%}"]
                layers.add_row(
                    *(where if moe else where[:1]),
                    f"{sparsity:.2%}",
                    f"{self.gate_positive[layer][expert]:.2%}",
                    f"{self.up_positive[layer][expert]:.2%}",
                    f"{self.both_positive[layer][expert]:.2%}",
                    str(self.dead_neurons[layer][expert]),
                    f"{self.hot_share[layer][expert]:.1%}",
                )
        near = [
            f"{share:.1%} of Combined is below {float(part):.0%} of its token's largest entry"
            for part, share in self.near_zero.items()
        ]
        lines = [*near, *self._sets(), *self._kept(), f"statistics: {self.out}"]
        return Group(corpora, layers, *lines)

    def _sets(self) -> Iterator[str]:
        """What the active sets of several tokens have in common."""
        overlap = sum(self.overlap) / len(self.overlap)
        yield f"{overlap:.1%} of a token's active neurons are those of the token before"
        for what, shares in {
            "neighbouring tokens": self.window_share,
            "tokens far apart": self.batch_share,
        }.items():
            if shares:
                words = ", ".join(f"{size}: {share:.1%}" for size, share in shares.items())
                yield f"of a layer's neurons, {what} need together: {words}"

    def _kept(self) -> Iterator[str]:
        """Perplexity against kept neurons."""
        if not self.curves:
            return
        yield f"perplexity of {self.curves['tokens']} tokens where only some neurons are kept:"
        for method, points in self.curves["methods"].items():
            words = [f"{p['kept']:.1%}: {p['perplexity']:.2f}" for p in points]
            if method == "gate":  # what to write into config.json
                words = [f"{w} at {p['setting']:.3g}" for w, p in zip(words, points, strict=True)]
            yield f"  {method}: {', '.join(words)}"
        rise, at = self.curves["rise"], self.curves["cett"]
        yield (
            f"  it rises by {rise:g} % at CETT {at['setting']:.3f}, with {at['kept']:.1%} kept"
            if at
            else f"  it never rises by {rise:g} %"
        )


def analyse(
    model: str,
    *,
    data: Sequence[AnyPath] = (),
    add: Sequence[AnyPath] = (),
    out: AnyPath | None = None,
    template: str = "{text}",
    separator: str | None = None,
    last: int | None = None,
    window: int | None = None,
    truncate: bool = False,
    max_tokens: int | None = None,
    activation: Activation | None = None,
    curves: int | None = None,
    rise: float = 1.0,
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
    add
        Statistics files of other runs of this model, on other texts: all are added up. Without
        --data nothing is run.
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
    curves
        Also measure perplexity against kept neurons, on about this many tokens (2048 is a start),
        some 30 times: by top-k, by one threshold, by CETT, and by gates that are cut.
    rise
        Percent of perplexity that the CETT looked for may cost.
    device
        auto takes a GPU if there is one. A model larger than the memory runs layer by layer.
    dtype
        By default the type that the weights are stored in.
    """
    sources = [local_path(source) for source in data]
    _check(bool(sources or add), last=last, window=window, max_tokens=max_tokens, curves=curves)
    if rise <= 0:
        raise TurboSparseError(f"--rise is {rise:g}; give a percentage above 0")
    folder = model_folder(model)

    def corpora() -> dict[str, Iterable[str]]:
        return {
            str(source): take_last(found, last) if last else found
            for source in sources
            for found in [documents(source, template=template, separator=separator)]
        }

    if is_packed(folder):
        if add or curves:
            raise TurboSparseError("--add and --curves need a folder with plain weights")
        return _analyse_packed(folder, corpora(), window, truncate, max_tokens)
    if out is None and folder != local_path(model):
        raise TurboSparseError(
            f"{model} is not a local folder: say with --out where the statistics go"
        )
    path = local_path(out or folder) / FILE
    _check_writable(path)
    others = [Stats.load(local_path(file)) for file in add]
    stats = reduce(operator.add, others, Stats.empty(load_config(folder, activation)))
    if sources:
        network, tokenizer = _open(folder, activation, device, dtype), load_tokenizer(folder)
        limits: dict[str, Any] = {"window": window, "truncate": truncate, "max_tokens": max_tokens}
        if curves and isinstance(network, Layerwise):
            raise TurboSparseError("--curves runs a model many times: it has to fit in memory")
        stats = measure(network, tokenizer, corpora(), **limits) + stats
        if curves:
            stats.curves = _curves(network, tokenizer, corpora(), curves, rise, window)
    stats.about["model"] = str(model)
    try:
        stats.save(path)
    except OSError as error:  # the figures are worth more than the file
        note(f"cannot write {path} ({error.strerror}): the statistics are only printed")
    return summarise(stats, str(path))


def _curves(
    model: Any,
    tokenizer: Any,
    corpora: dict[str, Iterable[str]],
    tokens: int,
    rise: float,
    window: int | None,
) -> Curves:
    """The same number of tokens of each corpus, from its first texts on."""
    config, share = model.config, -(-tokens // len(corpora))
    width = min(window or 1024, config.max_position_embeddings)
    pieces = [
        piece
        for texts in corpora.values()
        for piece in windows(tokenizer, texts, width, False, share, config.vocab_size)
    ]
    return curves_of(model, pieces, rise=rise)


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
            corpus: windows(tokenizer, texts, width, truncate, max_tokens, vocabulary)
            for corpus, texts in corpora.items()
        },
    )


def _check(data: bool, **numbers: int | None) -> None:
    if not data:
        raise TurboSparseError("give --data, a file or folder of held-out text")
    for name, value in numbers.items():
        if value is not None and value < 1:
            flag = name.replace("_", "-")
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
    device = device_to_use(device)
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
    up, both = stats.signs_ratio().tolist()
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
        up_positive=up,
        both_positive=both,
        expert_share=share.tolist(),
        router_entropy=stats.router_entropy(),
        dead_neurons=(stats.active == 0).sum(-1).tolist(),
        hot_share=stats.hot_share(),
        overlap=stats.overlap(),
        window_share=stats.together("windows"),
        batch_share=stats.together("batches"),
        near_zero=stats.near_zero,
        curves=stats.curves.model_dump() if stats.curves else None,
    )
