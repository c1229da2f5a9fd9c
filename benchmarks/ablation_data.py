"""The corpus of `ablation.py`: per domain the base's tokens, the further ones, and a held-out part.

A document stands in one of the three at most, and a text that repeats another is left out.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from turbosparse.base.errors import TurboSparseError
from turbosparse.base.folders import new_folder
from turbosparse.demo.corpus import make_corpus
from turbosparse.training.readers import corpus_files, documents

PARTS = ("base", "extra", "held_out")
# how a JSON row becomes text: the first that fits a file's first row
TEMPLATES = ("{text}", "{question}\n{answer}", "{prompt}\n{response}", "{instruction}\n{output}")
END = "<|endoftext|>"
PIECE = 2000  # characters at least, of a text file that does not say where its documents end
LONGEST_HELD_OUT = 8000  # characters, so that one book is not the whole held-out part
BYTES_PER_TOKEN = 6  # a generous guess


def make_data(
    folder: Path, source: Path | None, *, tokens: int, extra_tokens: int, held_out: int, seed: int
) -> dict[str, dict[str, int]]:
    """Write ``folder/<domain>/{base,extra,held_out}.jsonl``; return the bytes of each.

    Each sub-folder of `source` is a domain; without a source the demo's corpus is made.
    """
    if not folder.exists():
        with tempfile.TemporaryDirectory() as made, new_folder(folder) as work:
            if source is None:
                source = Path(made)
                size = min(6_000_000, max(100_000, tokens + extra_tokens))
                make_corpus(source, bytes_per_domain=size, seed=seed)
            domains = sorted(path for path in source.iterdir() if path.is_dir())
            if not domains:
                raise TurboSparseError(f"{source} has no sub-folder; each of them is a domain")
            share = BYTES_PER_TOKEN / len(domains)
            budgets = [int(share * count) for count in (tokens, extra_tokens)]
            for domain in domains:
                parts = _split(domain, budgets, BYTES_PER_TOKEN * held_out, seed)
                _write(work / domain.name, parts)
    return {
        domain.name: {part: (domain / f"{part}.jsonl").stat().st_size for part in PARTS}
        for domain in sorted(folder.iterdir())
    }


def training_texts(corpus: Path, most: int = 4_000_000) -> Iterator[str]:
    """Up to so many characters of each domain of the base's part, for a tokenizer."""
    for domain in sorted(corpus.iterdir()):
        size = 0
        for text in documents(domain / "base.jsonl"):
            yield text
            size += len(text)
            if size > most:
                break


def _split(domain: Path, budgets: list[int], held_out: int, seed: int) -> dict[str, list[str]]:
    """The parts of a domain, up to these bytes; what is short is shared in proportion."""
    rng = random.Random(f"{seed} {domain.name}")
    if (domain / "held_out.jsonl").is_file():  # as the demo's corpus has it
        kept = _distinct(documents(domain / "held_out.jsonl"), set())
        texts = _distinct(documents(domain / "train.jsonl"), {_key(text) for text in kept})
        rng.shuffle(texts)
    else:
        texts = _distinct(_documents(domain), set())
        rng.shuffle(texts)
        most, kept = max(1, len(texts) // 10), []  # documents
        while len(kept) < most and sum(map(len, kept)) < held_out:
            kept.append(texts.pop()[:LONGEST_HELD_OUT])
    whole = sum(len(text.encode()) for text in texts)
    scale = min(1.0, whole / max(1, sum(budgets)))
    base = _take(texts, int(scale * budgets[0]))
    extra = _take(texts, int(scale * budgets[1]))
    return {"base": base, "extra": extra, "held_out": [text[:LONGEST_HELD_OUT] for text in kept]}


def _documents(domain: Path) -> Iterator[str]:
    for file in corpus_files(domain):
        if ".jsonl" in file.suffixes:
            template = _template(file)
            if template is None:
                print(f"{file} is left out: its rows fit none of {TEMPLATES}", file=sys.stderr)
                continue
            yield from documents(file, template=template)
        else:
            texts = list(documents(file, separator=END))
            yield from texts if len(texts) > 1 else _pieces(texts[0])


def _template(file: Path) -> str | None:
    for template in TEMPLATES:
        try:
            next(documents(file, template=template))
        except TurboSparseError:
            continue
        return template
    return None


def _pieces(text: str) -> Iterator[str]:
    """Lines together, until they are a piece."""
    lines: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        size += len(line)
        if size >= PIECE:
            yield "".join(lines)
            lines, size = [], 0
    if lines:
        yield "".join(lines)


def _key(text: str) -> str:
    return " ".join(text.split()).casefold()


def _distinct(texts: Iterator[str], seen: set[str]) -> list[str]:
    new = []
    for text in texts:
        key = _key(text)
        if key not in seen:
            seen.add(key)
            new.append(text)
    return new


def _take(texts: list[str], size: int) -> list[str]:
    """Take documents from the end of `texts`, until they have so many bytes."""
    taken = []
    while texts and size > 0:
        taken.append(texts.pop())
        size -= len(taken[-1].encode())
    return taken


def _write(folder: Path, parts: dict[str, list[str]]) -> None:
    folder.mkdir()
    for part, texts in parts.items():
        rows = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        (folder / f"{part}.jsonl").write_text("".join(rows), encoding="utf-8")
