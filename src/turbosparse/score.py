"""What predictors cost and save: quality on held-out text, bytes, tokens/s.

Reads model folders with a predictor each, and writes what was measured and the best thresholds into
their config.json, for `pack`, and all of it into predictor_scores.json, for `report`.

    turbosparse predictor score mistral-predicted --data held_out.jsonl
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import TypeAdapter, ValidationError

from turbosparse.analysis.figures import pareto
from turbosparse.base.errors import TurboSparseError
from turbosparse.base.folders import AnyPath, local_path, new_file, read_config, write_json
from turbosparse.base.machine import Device
from turbosparse.benchmark.harness import Spread
from turbosparse.benchmark.modes import modes_in_turn
from turbosparse.hf.layerwise import Layerwise
from turbosparse.ops.predictor import Predictor
from turbosparse.ops.rows import Quant
from turbosparse.pack import pack
from turbosparse.predictors.mask import predictor_of
from turbosparse.predictors.measure import Recall
from turbosparse.predictors.score import CALIBRATED, Run, bytes_of, run_layers
from turbosparse.training.sample import sequences

SCORES = "predictor_scores.json"  # what `score` found, for the figure of a report


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
    speed: dict[str, Spread] | None = None  # tokens/s in each mode, at the folder's thresholds

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
        if self.speed:
            table.caption += "\ntokens/s: "
            table.caption += ", ".join(f"{mode} {speed}" for mode, speed in self.speed.items())
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
    rounds: int = 0,
    threads: int | None = None,
    picture: AnyPath | None = None,
    template: str = "{text}",
    separator: str | None = None,
    device: Device = "auto",
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
        Repeat it for each: --targets 0.98 --targets 0.99.
    bound
        Most perplexity that may be lost, in percent.
    tokens
        About so many are read.
    quant
        Of the model, to count bytes and for --rounds.
    predictor_quant
        Of the matrices of a predictor, likewise.
    rounds
        Also measure tokens/s: pack the model for this, and decode some of the text so many times
        in each mode, in turn.
    threads
        Of --rounds; by default all processors of this process.
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
        if rounds:
            speed = _speed(folder, ids[0].tolist(), rounds, threads, (quant, predictor_quant))
            found[-1] = dataclasses.replace(found[-1], speed=speed)
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


def _speed(
    folder: Path, text: list[int], rounds: int, threads: int | None, quants: tuple[Quant, Quant]
) -> dict[str, Spread]:
    """Tokens/s of a model in each mode, packed for this as it is."""
    with TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.scoring.") as work:
        packed = Path(work) / "packed"
        pack(str(folder), packed, quant=quants[0], predictor_quant=quants[1])
        return modes_in_turn(packed, text, rounds=rounds, threads=threads)


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
