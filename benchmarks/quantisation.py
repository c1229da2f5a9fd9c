"""What quantising costs: the perplexity of a model packed in every format, or in part.

    python benchmarks/quantisation.py MODEL --importance SEEN.txt --data HELD_OUT.txt

The importance of columns is measured on one text and perplexity on another. Embedding and head are
q8 beside q4 and q4_0, as `pack` has it by default. Prints Markdown and ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

from turbosparse.analyse import analyse
from turbosparse.benchmark.harness import machine
from turbosparse.hf.hub import model_folder
from turbosparse.pack import pack
from turbosparse.packed.stats import FILE

ROLES = ("q", "k", "v", "o", "gate", "up", "down", "embedding")
# name in the table, quantisation, and whether importance is given
WHOLE = {
    "f16": ("f16", False),
    "q8": ("q8", False),
    "q4_0": ("q4_0", False),
    "q4, no importance": ("q4", False),
    "q4": ("q4", True),
}


class Lab:
    """Packs a model in many ways and measures each on the held-out text."""

    def __init__(self, args: argparse.Namespace, work: Path):
        self.args, self.work, self.folder = args, work, work / "model"
        # without statistics of its own, which `pack` would find
        shutil.copytree(model_folder(args.model), self.folder, ignore=lambda *_: [FILE])
        self.text = {"separator": args.separator, "max_tokens": args.tokens}
        analyse(str(self.folder), data=[args.importance], out=work, **self.text)

    def nats(self, quant: str, quant_map: str, importance: bool) -> tuple[float, int]:
        """Of a token of the held-out text, and the bytes of the packed folder."""
        with tempfile.TemporaryDirectory(dir=self.work) as made:
            stats = self.work / FILE if importance else None
            packed = pack(
                str(self.folder), f"{made}/p", quant=quant, quant_map=quant_map, stats=stats
            )
            found: Any = analyse(f"{made}/p", data=[self.args.data], **self.text)
        (nats,) = found.nats_per_token.values()
        return nats, packed.bytes

    def role(self, role: str, quant: str) -> float:
        return self.nats("f16", f"{role}={quant}", importance=True)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model")
    parser.add_argument("--importance", type=Path, required=True, help="text to learn it from")
    parser.add_argument("--data", type=Path, required=True, help="text to measure, another one")
    parser.add_argument("--separator", help="between the documents of a text file")
    parser.add_argument("--tokens", type=int, default=20_000, help="of each text")
    parser.add_argument("--roles", action="store_true", help="also each kind of matrix alone")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        lab = Lab(args, Path(work))
        whole = {name: lab.nats(quant, "", given) for name, (quant, given) in WHOLE.items()}
        alone = {
            role: {quant: lab.role(role, quant) for quant in ("q8", "q4_0", "q4")}
            for role in (ROLES if args.roles else ())
        }
    dense = whole["f16"][0]
    print("| | perplexity | more than f16 | MB |\n|---|---|---|---|")
    for name, (nats, size) in whole.items():
        print(f"| {name} | {math.exp(nats):.3f} | {more(nats - dense)} | {size / 1e6:.1f} |")
    for role, of in alone.items():
        print(
            f"| only {role} | " + ", ".join(f"{q} {more(n - dense)}" for q, n in of.items()) + " |"
        )
    print(json.dumps({"machine": machine(), "model": args.model, "whole": whole, "alone": alone}))


def more(nats: float) -> str:
    return f"{100 * (math.exp(nats) - 1):+.2f} %"


if __name__ == "__main__":
    main()
