"""Draw docs/speed.svg from the measured results of `turbosparse bench`.

python benchmarks/figures.py benchmarks/results/zen5-2cpu.jsonl
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

MODES = ("dense", "exact", "predicted")
COLOURS = {"dense": "#9aa5b1", "exact": "#3d8bcd", "predicted": "#e07b39"}


def rows(results: Path) -> list[dict[str, Any]]:
    """The rows of the 7B shape in 4 bits, one sequence, that have a peer."""
    found = [json.loads(line) for line in results.read_text().splitlines()]
    return [
        row
        for row in found
        if row["model"].startswith("synthetic mistral-7b, sparsity 0.9")
        and "predictor sign" not in row["model"]
        and (row["quant"], row["batch"]) == ("q4", 1)
        and row["peer"]
    ]


def draw(results: Path, out: Path) -> None:
    """Tokens/s of each mode over the peer's, by number of threads."""
    measured = rows(results)
    threads = sorted({row["threads"] for row in measured})
    matplotlib.rcParams["svg.hashsalt"] = "turbosparse"  # the same input gives the same file
    figure, axes = plt.subplots(figsize=(7.2, 2.6), layout="constrained")
    for number, mode in enumerate(MODES):
        of = {row["threads"]: row["ratio"] for row in measured if row["mode"] == mode}
        at = [index + (1 - number) * 0.26 for index in range(len(threads))]
        ratios = [of[count] for count in threads]
        medians = [ratio["median"] for ratio in ratios]
        spread = [
            [r["median"] - r["least"] for r in ratios],
            [r["greatest"] - r["median"] for r in ratios],
        ]
        axes.barh(at, medians, 0.24, xerr=spread, color=COLOURS[mode], label=mode, ecolor="#555")
        for y, ratio in zip(at, ratios, strict=True):
            axes.text(ratio["greatest"] + 0.05, y, f"{ratio['median']:.2f} ×", va="center")
    axes.axvline(1, color="#333", linewidth=1)
    axes.set_yticks(range(len(threads)), [f"{n} thread{'s' * (n > 1)}" for n in threads])
    axes.set_xlabel("decoding speed, as a multiple of llama.cpp's (dense Q4_0, same shape)")
    axes.set_xlim(0, 4.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper right", frameon=False)
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/speed.svg"))
    chosen = parser.parse_args()
    draw(chosen.results, chosen.out)
