"""Predictors: which neurons a token needs, found before their rows are read.

`train` makes one for each feed-forward of a sparse model folder, and writes them merged into a
copy of it, which convert, export and pack take as it is. `score` measures what they cost and sets
their thresholds.

    turbosparse predictor train mistral-sparse mistral-predicted --data books --data web.jsonl
    turbosparse predictor score mistral-predicted --data held_out.jsonl
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file

from turbosparse.analysis.figures import pareto
from turbosparse.base.errors import TurboSparseError
from turbosparse.base.folders import (
    AnyPath,
    check_free,
    copy_companions,
    local_path,
    named_disk_errors,
    new_file,
    new_folder,
    read_config,
    write_json,
)
from turbosparse.hf import families
from turbosparse.hf.activations import WITHOUT_ZEROS
from turbosparse.hf.checkpoint import INDEX, PREDICTOR, add_shard
from turbosparse.hf.hub import model_folder
from turbosparse.hf.layerwise import Layerwise
from turbosparse.hf.load import activation_keys, activation_of, copy_code, threshold_of
from turbosparse.hf.published import own_fields
from turbosparse.hf.steps import shard_name
from turbosparse.ops.predictor import Predictor
from turbosparse.ops.rows import Quant
from turbosparse.predictors.make import HELD_OUT, How, make_layers, rank_of
from turbosparse.predictors.mask import find_predictor, predictor_of
from turbosparse.predictors.measure import Recall
from turbosparse.predictors.score import CALIBRATED, Run, bytes_of, run_layers
from turbosparse.training.sample import sequences

SCORES = "predictor_scores.json"  # what `score` found, for the figure of a report


@dataclass(frozen=True)
class Trained:
    """What `train` wrote; shares are means over the layers, on text kept apart."""

    out: str
    kind: str
    rank: int | None
    recall: float
    norm_recall: float
    density: float
    active: float

    def __str__(self) -> str:
        rank = f" of rank {self.rank}" if self.rank else ""
        return (
            f"{self.out}: {self.kind} predictors{rank}; norm recall {self.norm_recall:.2%}, recall "
            f"{self.recall:.2%}, {self.density:.1%} of the neurons are candidates where "
            f"{self.active:.1%} are active. What that costs in quality says "
            "`turbosparse predictor score`."
        )


def train(
    model: str,
    out: AnyPath,
    *,
    data: Sequence[AnyPath],
    kind: Literal["lowrank", "svd", "sign"] = "lowrank",
    reads: Literal["post_norm", "pre_norm"] = "post_norm",
    share: float = 0.11,
    carry: float = 0.99,
    recall: float = 0.995,
    epochs: int = 5,
    tokens: int = 300_000,
    seed: int = 0,
    template: str = "{text}",
    separator: str | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> Trained:
    """Make predictors for a sparse model, and write a copy of the model that holds them.

    Parameters
    ----------
    model
        Sparse model folder or hub id, without a predictor.
    out
        New model folder. A stopped run resumes from OUT.predicting when the same command is given
        again.
    data
        Text, JSON-lines or .gz file, or a folder of them, like the text that the model will see.
        Repeat it for more; each gets an equal share.
    kind
        lowrank trains two matrices for each feed-forward. svd takes them from a singular value
        decomposition of the weights. sign compares the signs of weights and inputs, and adds no
        weights. The last two need no training, but text for the threshold.
    reads
        What a predictor reads: what the feed-forward reads, or the residual before its norm, as
        PowerInfer has it.
    share
        Weights of a predictor, as a share of those of its feed-forward, at most.
    carry
        Train to find the neurons that carry this share of a token's output; 1: all active ones.
    recall
        Share of the output, by squares, that the candidates of each layer add: the threshold is
        chosen so. `score` chooses another.
    epochs
        Passes over the tokens.
    tokens
        Make them on about this many tokens; an eighth is kept apart for the thresholds. Far fewer
        give bad predictors of low_rank.
    seed
        Of the order of the tokens. The same seed gives the same predictors.
    template
        How a JSON row becomes text, such as "{question} {answer}".
    separator
        Text between the documents of a text file; without it a file is one document.
    device
        Where the layers run: auto takes a GPU if there is one.
    """
    out, texts = local_path(out), [local_path(path) for path in data]
    for flag, value in {"share": share, "carry": carry, "recall": recall}.items():
        if not 0 < value <= 1:
            raise TurboSparseError(f"--{flag} {value:g}: give more than 0 and at most 1")
    if tokens < 1 or epochs < 1:
        raise TurboSparseError(f"--tokens {tokens}, --epochs {epochs}: give at least 1 of each")
    check_free(out)
    folder = model_folder(model)
    layers = Layerwise(folder, device=device)
    _check_model(layers, kind, reads)
    rank = None if kind == "sign" else rank_of(layers.config, share)
    ids = sequences(folder, layers.config, texts, tokens, template, separator)
    if len(ids) < HELD_OUT:
        raise TurboSparseError(
            f"--tokens {tokens} are {len(ids)} sequences of {ids.shape[1]}; give at least "
            f"{HELD_OUT * ids.shape[1]}, for every eighth is kept apart"
        )
    how = How(kind, reads, rank, carry, recall, epochs, seed)
    state = out.with_name(out.name + ".predicting")
    with named_disk_errors(state):
        about = make_layers(layers, ids, state, how)
    block = {
        "kind": "low_rank" if rank else "sign",
        "input": reads,
        "threshold": [[one["threshold"] for one in layer] for layer in about],
    }
    total = reduce(Recall.plus, (Recall(*one["recall"]) for layer in about for one in layer))
    neurons = layers.config.intermediate_size
    _write(layers, state, len(about), block | total.shares(neurons), out)
    shutil.rmtree(state, ignore_errors=True)
    return Trained(str(out), kind, rank, active=total.share(neurons), **total.shares(neurons))


def _check_model(layers: Layerwise, kind: str, reads: str) -> None:
    folder, activation = layers.checkpoint.folder, activation_of(layers.config)
    if activation in WITHOUT_ZEROS:
        raise TurboSparseError(f"{folder} is a {activation} model: it has no zeros to predict")
    if kind == "sign" and reads != "post_norm":
        raise TurboSparseError("--reads pre_norm: sign reads what the feed-forward reads")
    if kind != "sign" and find_predictor(layers.config, layers.checkpoint):
        raise TurboSparseError(f"{folder} holds a predictor already; give the model without it")


def _write(layers: Layerwise, state: Path, count: int, block: dict[str, Any], out: Path) -> None:
    """A copy of the model folder with what the pass left in `state`."""
    folder, config = layers.checkpoint.folder, layers.config
    shards = [load_file(state / shard_name(index)) for index in range(count)]
    with new_folder(out) as work:
        for shard in layers.checkpoint.shards:
            shutil.copyfile(shard, work / shard.name)
        if (folder / INDEX).is_file():
            shutil.copyfile(folder / INDEX, work / INDEX)
        if merged := {name: tensor for shard in shards for name, tensor in shard.items()}:
            add_shard(work, PREDICTOR, merged)
        copy_companions(folder, work)
        if config.model_type.startswith(families.PREFIX):
            copy_code(work)
        fields = activation_keys(config.model_type, activation_of(config), threshold_of(config))
        write_json(work / "config.json", own_fields(folder) | fields | {"predictor": block})


@dataclass(frozen=True)
class Point:
    """A predictor at some thresholds; shares are means over the feed-forwards of all tokens."""

    target: float | None  # norm recall that the thresholds were chosen for; None: the folder's own
    recall: float
    norm_recall: float
    density: float
    perplexity: float  # ÷ that without the predictor
    kl: float  # nats per token
    bytes: float  # of the feed-forwards ÷ those of exact mode

    @property
    def title(self) -> str:
        return "as it is" if self.target is None else f"{self.target:g}"


@dataclass(frozen=True)
class Scored:
    """What `score` found of one model."""

    model: str
    predictor: str
    tokens: int
    perplexity: float  # without the predictor
    active: float
    share: float  # bytes of the predictor ÷ those of its feed-forward
    points: list[Point]
    chosen: int | None  # of `points`; None: no point is within the bound
    layers: list[list[float]]  # of the chosen or the first: recall, norm recall, density, active

    def tables(self) -> list[Any]:
        from rich.table import Table

        heads = ("recall", "norm recall", "density", "active")
        each = Table("layer", *heads)
        for layer, row in enumerate(self.layers):
            each.add_row(str(layer), *(f"{share:.2%}" for share in row))
        title = (
            f"{self.model}: {self.predictor}, {self.share:.1%} of the feed-forward; "
            f"{self.active:.1%} active, perplexity {self.perplexity:.3f} on {self.tokens} tokens"
        )
        table = Table("target", *heads[:3], "perplexity", "KL", "bytes", title=title)
        for number, point in enumerate(self.points):
            shares = (point.recall, point.norm_recall, point.density)
            text = [f"{share:.2%}" for share in shares]
            text += [f"{point.perplexity - 1:+.3%}", f"{point.kl:.5f}", f"{point.bytes:.3f}"]
            kept = " (kept)" if number == self.chosen else ""
            table.add_row(point.title + kept, *text)
        table.caption = "perplexity: against the model without it; bytes: against exact mode"
        return [each, table]


@dataclass(frozen=True)
class Scores:
    """What `score` found."""

    models: list[Scored]

    def __rich__(self) -> Any:
        from rich.console import Group

        return Group(*(table for model in self.models for table in model.tables()))


def score(
    models: list[str],
    *,
    data: Sequence[AnyPath],
    targets: Sequence[float] = (0.98, 0.99, 0.995, 0.999, 0.9995),
    bound: float = 0.1,
    tokens: int = 16_384,
    quant: Quant = "q4",
    predictor_quant: Quant = "q8",
    picture: AnyPath | None = None,
    template: str = "{text}",
    separator: str | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> Scores:
    """Measure what predictors cost in quality and save in bytes; keep the best thresholds.

    The cheapest thresholds whose perplexity is within the bound are written into the model's
    config.json with what was measured, and pack records it: --mode auto then takes predicted mode.
    All points go into predictor_scores.json beside it, which report draws.

    Parameters
    ----------
    models
        Model folders with a predictor each.
    data
        Held-out text: a text, JSON-lines or .gz file, or a folder of them; repeat it for more. A
        quarter of it is for the thresholds, the rest is measured.
    targets
        Norm recalls to try: the share of each layer's output, by squares, that candidates add.
    bound
        Most perplexity that may be lost, in percent.
    tokens
        About so many are read.
    quant
        Of the feed-forwards, to count bytes.
    predictor_quant
        Of the matrices of a predictor, to count bytes.
    picture
        New PNG file: perplexity against bytes.
    template
        How a JSON row becomes text, such as "{question} {answer}".
    separator
        Text between the documents of a text file; without it a file is one document.
    device
        Where the layers run: auto takes a GPU if there is one.
    """
    texts = [local_path(path) for path in data]
    if wrong := [target for target in targets if not 0 < target <= 1]:
        raise TurboSparseError(f"--targets {wrong[0]:g}: give more than 0 and at most 1")
    found = []
    for model in models:
        folder = local_path(model)
        layers = Layerwise(folder, device=device)
        about = predictor_of(layers.config, layers.checkpoint, predictor_quant)
        ids = sequences(folder, layers.config, texts, tokens, template, separator)
        if len(ids) < CALIBRATED:
            raise TurboSparseError(f"--tokens {tokens} are fewer than {CALIBRATED} sequences")
        nats, count, runs = run_layers(layers, about, ids, list(targets))
        runs[0].check(folder, about, layers.config.intermediate_size)
        found.append(_scored(folder, layers.config, about, (nats, count, runs), quant, bound))
        with new_file(folder / SCORES) as work:
            write_json(work, asdict(found[-1]))
    if picture:
        draw_picture(found, local_path(picture))
    return Scores(found)


def _scored(
    folder: Path,
    config: Any,
    about: Predictor,
    ran: tuple[float, int, list[Run]],
    quant: str,
    bound: float,
) -> Scored:
    (nats, count, runs), neurons = ran, config.intermediate_size
    points = []
    for run in runs:
        total = run.total()
        read, share = bytes_of(config, about, total, quant)
        perplexity, kl = math.exp((run.nats - nats) / count), run.kl / count
        measured = total.shares(neurons)
        points.append(Point(run.target, **measured, perplexity=perplexity, kl=kl, bytes=read))
    within = [n for n, point in enumerate(points) if point.perplexity <= 1 + bound / 100]
    chosen = min(within, key=lambda n: points[n].bytes, default=None)
    kept = runs[chosen or 0]
    block = {"kind": about.kind, "input": about.input, "threshold": kept.thresholds}
    if chosen is None:  # as they were
        block["threshold"] = about.threshold  # type: ignore[assignment]
    best = points[chosen or 0]
    told = ("recall", "norm_recall", "density", "perplexity", "bytes")
    block |= {name: getattr(best, name) for name in told} | {"bound": 1 + bound / 100}
    with new_file(folder / "config.json") as work:
        write_json(work, read_config(folder) | {"predictor": block})
    layers = []
    for experts in kept.recalls:
        layer = reduce(Recall.plus, experts)
        layers.append([*layer.shares(neurons).values(), layer.share(neurons)])
    total = runs[0].total()
    return Scored(
        model=str(folder),
        predictor=str(about.kind),
        tokens=count,
        perplexity=math.exp(nats / count),
        active=total.share(neurons),
        share=share,
        points=points,
        chosen=chosen,
        layers=layers,
    )


def read_scores(folder: Path) -> Scored | None:
    """What `score` found of the model in this folder, if it did.

    Raises:
        TurboSparseError: the file is not one that `score` wrote.
    """
    if not (folder / SCORES).is_file():
        return None
    try:
        return TypeAdapter(Scored).validate_python(read_config(folder, SCORES))
    except ValidationError as error:
        raise TurboSparseError(
            f"{folder / SCORES} is not what `turbosparse predictor score` writes; run it again"
        ) from error


def draw_picture(found: list[Scored], path: Path) -> None:
    """Perplexity against bytes, a line for each predictor.

    Raises:
        TurboSparseError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TurboSparseError("--picture needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(7.2, 4), layout="constrained")
    axes = figure.subplots()
    pareto(axes, [{"name": Path(one.model).name, "predictor": asdict(one)} for one in found])
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with new_file(path) as work:
        figure.savefig(work, format="png", dpi=150)
