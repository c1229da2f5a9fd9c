"""Measure what guessing ahead gives: tokens/s with and without, in turn, of the same texts.

    python benchmarks/drafting.py PACKED [--draft SMALLER] [--prompts FILE]

Without a file it asks for an edit of some code, where the answer repeats the question, and for a
text of its own. A file holds one JSON object a line, {"name": ..., "prompt": ...}. The prompt goes
through the model's chat template, if it has one. The texts are compared token by token.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import turbosparse
from turbosparse.base.errors import TurboSparseError
from turbosparse.benchmark.harness import Spread, machine
from turbosparse.engine.drafting import Draft, open_draft
from turbosparse.engine.generation import Ends, Token, stream
from turbosparse.engine.sampling import Sampling

CODE = """\
def area(width, height):
    return width * height

def perimeter(width, height):
    return 2 * (width + height)

def diagonal(width, height):
    return (width ** 2 + height ** 2) ** 0.5
"""
PROMPTS = {
    "edit": f"Repeat this code and add a docstring to each function:\n{CODE}",
    "open": "Tell me about the sea trade in the north of Europe.",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="packed folder")
    parser.add_argument("--draft", default="auto", help="as of `turbosparse generate`")
    parser.add_argument("--prompts", type=Path, help="JSON lines")
    parser.add_argument("--tokens", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--mode", default="auto")
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    prompts = PROMPTS
    if given.prompts:
        rows = map(json.loads, given.prompts.read_text().splitlines())
        prompts = {row["name"]: row["prompt"] for row in rows}
    model = turbosparse.load(given.model, mode=given.mode, threads=given.threads)
    print(machine(), model.engine.describe(), sep="\n")
    for name, prompt in prompts.items():
        measure(model, name, prompt, given)


def measure(model: turbosparse.Model, name: str, prompt: str, given: argparse.Namespace) -> None:
    try:
        ids = model.tokenizer.chat([{"role": "user", "content": prompt}])
    except TurboSparseError:  # it has no template
        ids = model.tokenizer.encode(prompt)
    draft = open_draft(given.draft, model.engine, model.tokenizer)
    assert draft, "--draft off is what it is compared with"
    speeds: dict[bool, list[float]] = {False: [], True: []}
    texts = set()
    for _ in range(given.rounds):
        for drafted in (False, True):
            tokens = write(model, ids, draft if drafted else None, given)
            texts.add(tuple(token.id for token in tokens))
            seconds = sum(token.seconds for token in tokens[1:])
            speeds[drafted].append((len(tokens) - 1) / seconds)
    assert len(texts) == 1, "a text differs with guesses"
    ratio = Spread.of([b / a for a, b in zip(speeds[False], speeds[True], strict=True)])
    print(
        f"{name}: {Spread.of(speeds[False])} tokens/s, guessing {Spread.of(speeds[True])}, "
        f"ratio {ratio}; {draft}"
    )


def write(
    model: turbosparse.Model, ids: list[int], draft: Draft | None, given: argparse.Namespace
) -> list[Token]:
    sampling = Sampling(given.temperature, seed=0)
    ends = Ends(given.tokens, model.tokenizer.stop_ids(chat=True))
    told = stream(model.engine, model.tokenizer, ids, sampling=sampling, ends=ends, draft=draft)
    return list(told)


if __name__ == "__main__":
    main()
