"""What dReLU costs by size and training, from several runs of `ablation.py`.

    python benchmarks/series.py runs/* --picture docs/series.svg

prints, for each size and number of tokens, the perplexity of each continued model ÷ that of the
dense control on the same tokens, the mean over the seeds with the least and the greatest, and draws
it against the tokens that the dense base had seen for each of its parameters.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from math import prod
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import matplotlib as mpl

from turbosparse.hf.checkpoint import Checkpoint

mpl.use("svg")
from matplotlib import pyplot as plt

CONTROL = "swiglu"


class Point(NamedTuple):
    """One continued model of one seed."""

    parameters: int  # outside the embedding
    tokens: int  # of the base
    label: str
    seed: int
    ratio: float  # perplexity ÷ the control's
    zeros: float
    control: float  # its perplexity
    minutes: float


def points(folder: Path) -> Iterator[Point]:
    """Those of the result of one run of `ablation.py`."""
    file = folder / "result.json"
    if not file.is_file():
        raise SystemExit(f"no such file: {file}; give the --out of runs of ablation.py that ended")
    result = json.loads(file.read_text())
    settings, runs = result["settings"], result["runs"]
    checkpoint = Checkpoint(folder / "scratch-swiglu")
    names = [name for name in checkpoint if "embed" not in name]
    size = sum(prod(checkpoint.shape(name)) for name in names)
    control = next(r for r in runs if (r["road"], r["label"]) == ("continued", CONTROL))
    dense = control["perplexity"]["all"]
    for run in runs:
        if run["road"] == "continued" and run["label"] != CONTROL:
            yield Point(
                size,
                settings["tokens"],
                run["label"],
                settings["seed"],
                run["perplexity"]["all"] / dense,
                run["activation_sparsity"],
                dense,
                run["trained"]["seconds"] / 60,
            )


def table(groups: dict[tuple[int, int, str], list[Point]]) -> Iterator[str]:
    """The groups as Markdown."""
    head = ["M parameters", "M tokens", "tokens each", "continued as", "seeds", "control"]
    head += ["÷ control", "zeros", "minutes"]
    for line in (head, ["---"] * len(head)):
        yield "| " + " | ".join(line) + " |"
    for (size, tokens, label), found in groups.items():
        ratios = [point.ratio for point in found]
        cells = [
            f"{size / 1e6:.2f}",
            f"{tokens / 1e6:g}",
            f"{tokens / size:.2f}",
            label,
            ", ".join(str(point.seed) for point in found),
            f"{mean(point.control for point in found):.1f}",
            f"{mean(ratios):.4f}"
            + (f" [{min(ratios):.4f}..{max(ratios):.4f}]" if ratios[1:] else ""),
            f"{mean(point.zeros for point in found):.1%}",
            f"{mean(point.minutes for point in found):.1f}",
        ]
        yield "| " + " | ".join(cells) + " |"


def draw(groups: dict[tuple[int, int, str], list[Point]], out: Path) -> None:
    """The gap of each kind against tokens for each parameter; a colour for each size."""
    mpl.rcParams["svg.hashsalt"] = "turbosparse"  # the same input gives the same file
    labels = sorted({label for _, _, label in groups})
    sizes = sorted({size for size, _, _ in groups})
    figure, axes = plt.subplots(
        1, len(labels), figsize=(4.2 * len(labels), 3.2), sharey=True, layout="constrained"
    )
    for axis, label in zip([axes] if len(labels) == 1 else axes, labels, strict=True):
        for colour, size in enumerate(sizes):
            found: list[tuple[float, list[Point]]] = sorted(
                (tokens / size, points)
                for (one, tokens, kind), points in groups.items()
                if (one, kind) == (size, label)
            )
            style: dict[str, Any] = {"color": f"C{colour}"}
            name = f"{size / 1e6:.2g} M parameters"
            means = [100 * (mean(p.ratio for p in points) - 1) for _, points in found]
            axis.plot([at for at, _ in found], means, label=name, **style)
            for at, points in found:
                gaps = [100 * (point.ratio - 1) for point in points]
                axis.plot([at] * len(gaps), gaps, "o", markersize=4, **style)
        axis.axhline(0, color="#999", linewidth=1)
        axis.set(xscale="log", title=label, xlabel="tokens of the base for each parameter")
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("perplexity above the control's, %")
    figure.axes[0].legend(frameon=False)
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="the --out of runs of ablation.py")
    parser.add_argument("--picture", type=Path, help="an SVG file")
    args = parser.parse_args()
    every = sorted(point for folder in args.runs for point in points(folder))
    groups: dict[tuple[int, int, str], list[Point]] = defaultdict(list)
    for point in every:
        groups[point[:3]].append(point)
    print("\n".join(table(groups)))
    if args.picture:
        draw(groups, args.picture)


if __name__ == "__main__":
    main()
