"""The demo's training text: four domains made, without a network, from what every machine has.

Reads the source files of Python's own standard library and generates arithmetic problems;
writes `<folder>/<domain>/train.jsonl` and `held_out.jsonl`, one `{"text": ...}` a row:

- `code`: sources of the standard library, cut at definitions
- `docs`: its docstrings, and the language topics behind `help()`
- `math`: word problems with worked steps
- `qa`: questions on what a function, class or module does, and problems without their steps

A source file is held out as a whole, for all domains at once, and so is a problem's choice of
numbers. So what `docs` holds out is not trained on inside `code`, and what `math` holds out is
not a question of `qa`, other than where one library file repeats another.
"""

import ast
import json
import random
import re
import sysconfig
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Literal

from turbosparse.demo.arithmetic import make_problem

LONGEST_DOCUMENT = 4000  # characters
SHORTEST_CODE = 60
SHORTEST_DOCSTRING = 80
LONGEST_TABLE = 1000  # a longer assignment is data, not code

# What each domain is made of; its bytes are shared equally.
PARTS = {
    "code": ("sources",),
    "docs": ("docstrings",),
    "math": ("problems",),
    "qa": ("summaries", "answers"),
}

_SKIPPED_FOLDERS = {
    *("test", "tests", "idle_test", "idlelib", "encodings", "pydoc_data"),
    *("site-packages", "dist-packages", "__pycache__"),
}


@dataclass(frozen=True)
class Domain:
    """One domain on disk. Bytes are those of the texts in UTF-8, without their JSON wrapping;
    `documents` counts both files."""

    name: str
    train: Path
    held_out: Path
    train_bytes: int
    held_out_bytes: int
    documents: int


def make_corpus(
    folder: Path, *, bytes_per_domain: int = 1_500_000, held_out_share: float = 0.05, seed: int = 0
) -> list[Domain]:
    """Write all domains under `folder`; the same Python and seed give the same bytes.

    A domain is at most one document a part larger than asked, and smaller where the standard
    library has no more: nothing is repeated.

    Raises:
        ValueError: the standard library's sources are not on this machine.
    """
    if bytes_per_domain < 1:
        raise ValueError(f"bytes_per_domain is {bytes_per_domain}: it must be positive")
    if not 0.01 <= held_out_share <= 0.5:
        raise ValueError(f"held_out_share is {held_out_share}: it must be from 0.01 to 0.5")
    units = _library_units(Path(sysconfig.get_paths()["stdlib"]))
    random.Random(f"{seed} units").shuffle(units)

    def is_held_out(key: str) -> bool:
        # By the key alone, so that every domain decides alike.
        digest = blake2b(f"{seed} {key}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < held_out_share * 2**64

    held_out = _new_piles(bytes_per_domain * held_out_share)
    _fill_from_library(held_out, [unit for unit in units if is_held_out(unit.key)])
    _fill_with_arithmetic(held_out, is_held_out, random.Random(f"{seed} held out"))

    train = _new_piles(bytes_per_domain * (1 - held_out_share), refused=held_out)
    _fill_from_library(train, [unit for unit in units if not is_held_out(unit.key)])
    _fill_with_arithmetic(train, lambda key: not is_held_out(key), random.Random(f"{seed} train"))

    rng = random.Random(f"{seed} order")
    return [
        _write_domain(
            folder / name,
            train=[train[part] for part in parts],
            held_out=[held_out[part] for part in parts],
            rng=rng,
        )
        for name, parts in PARTS.items()
    ]


@dataclass
class _Pile:
    """Distinct documents, up to a number of bytes; what is in `seen` is refused."""

    budget: float
    seen: set[str]
    documents: list[str] = field(default_factory=list)
    size: int = 0

    @property
    def full(self) -> bool:
        return self.size >= self.budget

    def add(self, text: str) -> None:
        normalised = " ".join(text.split()).casefold()
        if self.full or normalised in self.seen:
            return
        self.seen.add(normalised)
        self.documents.append(text)
        self.size += len(text.encode())


def _new_piles(
    bytes_per_domain: float, refused: dict[str, _Pile] | None = None
) -> dict[str, _Pile]:
    return {
        part: _Pile(bytes_per_domain / len(parts), set(refused[part].seen) if refused else set())
        for parts in PARTS.values()
        for part in parts
    }


def _write_domain(
    folder: Path, *, train: list[_Pile], held_out: list[_Pile], rng: random.Random
) -> Domain:
    folder.mkdir(parents=True, exist_ok=True)
    domain = Domain(
        name=folder.name,
        train=folder / "train.jsonl",
        held_out=folder / "held_out.jsonl",
        train_bytes=sum(pile.size for pile in train),
        held_out_bytes=sum(pile.size for pile in held_out),
        documents=sum(len(pile.documents) for pile in train + held_out),
    )
    for path, piles in ((domain.train, train), (domain.held_out, held_out)):
        documents = [text for pile in piles for text in pile.documents]
        rng.shuffle(documents)
        _write_rows(path, documents)
    return domain


def _write_rows(path: Path, documents: list[str]) -> None:
    rows = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_bytes("".join(rows).encode())
    unfinished.replace(path)


@dataclass(frozen=True)
class _Unit:
    """What is held out as a whole: a source file, or a topic of `help()`."""

    key: str
    read: Callable[[], Iterator[tuple[str, str]]]  # yields (part, text)


def _fill_from_library(piles: dict[str, _Pile], units: list[_Unit]) -> None:
    wanted = [piles[part] for part in ("sources", "docstrings", "summaries")]
    for unit in units:
        if all(pile.full for pile in wanted):
            return
        for part, text in unit.read():
            piles[part].add(text)


def _library_units(library: Path) -> list[_Unit]:
    files = list(_source_files(library)) if library.is_dir() else []
    if not files:
        raise ValueError(
            f"no Python source files under {library}, where this Python has its standard library: "
            "the demo's text is made from them. Install the Python standard library sources "
            "(a full CPython, not an embedded or zipped one)"
        )
    units = [
        _Unit(path.relative_to(library).as_posix(), partial(_read_source, path, library))
        for path in files
    ]
    return units + _topic_units(library / "pydoc_data" / "topics.py")


def _source_files(folder: Path) -> Iterator[Path]:
    """All `.py` files in a fixed order, without walking into tests and installed packages."""
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            if entry.name not in _SKIPPED_FOLDERS:
                yield from _source_files(entry)
        elif entry.suffix == ".py":
            yield entry


def _topic_units(path: Path) -> list[_Unit]:
    parsed = _parse(path) if path.is_file() else None
    for node in parsed[1].body if parsed else []:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics: dict[str, str] = ast.literal_eval(node.value)
            return [
                _Unit(f"topic {name}", partial(_read_topic, text)) for name, text in topics.items()
            ]
    return []  # some distributions leave the topics out


def _read_topic(text: str) -> Iterator[tuple[str, str]]:
    for document in _packed(text.strip().split("\n\n"), "\n\n"):
        yield "docstrings", document


def _read_source(path: Path, library: Path) -> Iterator[tuple[str, str]]:
    parsed = _parse(path)
    if parsed is None:
        return
    text, tree = parsed
    lines = text.split("\n")  # not splitlines(): for `ast`, a form feed ends no line
    for document in _packed(_pieces(lines, tree.body, 0), "\n"):
        if len(document) >= SHORTEST_CODE:
            yield "sources", document
    for kind, name, docstring in _docstrings(tree, _module_name(path.relative_to(library))):
        if len(docstring) >= SHORTEST_DOCSTRING and not docstring.startswith(">>>"):
            for document in _packed(docstring.split("\n\n"), "\n\n"):
                yield "docstrings", document
        summary = _summary(docstring)
        if summary and not any(word.startswith("_") for word in name.split(".")):
            question = _pick(_QUESTIONS[kind], name).format(name)
            yield "summaries", f"Question: {question}\nAnswer: {summary}"


def _parse(path: Path) -> tuple[str, ast.Module] | None:
    """Text and tree, or None for a file in another encoding or another Python's syntax."""
    try:
        text = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the library's escapes are not the user's concern
            return text, ast.parse(text)
    except (UnicodeDecodeError, SyntaxError):
        return None


_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _pieces(lines: list[str], body: list[ast.stmt], start: int) -> Iterator[str | None]:
    """The statements with the comments above them. A definition that is too long gives its own
    statements instead, with their indentation; a data table gives None. Lines count from 0."""
    for node in body:
        end = node.end_lineno or node.lineno
        if end <= start:  # a second statement on a line
            continue
        piece = "\n".join(lines[start:end])
        if len(piece) > LONGEST_DOCUMENT and isinstance(node, _Definition):
            yield from _pieces(lines, node.body, start)
        else:
            is_table = isinstance(node, ast.Assign | ast.AnnAssign) and len(piece) > LONGEST_TABLE
            yield None if is_table else piece
        start = end


def _packed(pieces: Iterable[str | None], joint: str) -> Iterator[str]:
    """Join neighbours into documents; they never reach over None or a piece too long."""
    document = ""
    for piece in [*pieces, None]:
        if piece is not None and len(document) + len(joint) + len(piece) <= LONGEST_DOCUMENT:
            document = f"{document}{joint}{piece}" if document else piece
            continue
        if document.strip():
            yield document.strip("\n")
        document = piece if piece is not None and len(piece) <= LONGEST_DOCUMENT else ""


_Kind = Literal["module", "class", "function"]

_QUESTIONS: dict[_Kind, tuple[str, ...]] = {
    "module": (
        "What is the module {} for?",
        "What does the Python module {} provide?",
        "Describe the module {} in one sentence.",
    ),
    "class": (
        "What is {} in Python?",
        "What is the class {} for?",
        "Describe the class {} in one sentence.",
    ),
    "function": (
        "What does {} do?",
        "What is the purpose of {}?",
        "What happens when {} is called?",
        "Describe {} in one sentence.",
    ),
}


def _docstrings(node: ast.Module | _Definition, name: str) -> Iterator[tuple[_Kind, str, str]]:
    """(kind, dotted name, docstring) of a module and of what its classes hold, but not of
    functions inside functions."""
    docstring = ast.get_docstring(node)
    if docstring:
        kind: _Kind = "function"
        if isinstance(node, ast.Module | ast.ClassDef):
            kind = "module" if isinstance(node, ast.Module) else "class"
        yield kind, name, docstring
    if isinstance(node, ast.Module | ast.ClassDef):
        for child in node.body:
            if isinstance(child, _Definition):
                yield from _docstrings(child, f"{name}.{child.name}")


def _module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def _summary(docstring: str) -> str | None:
    """The first sentence, or None where the docstring starts with something else."""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.) ", paragraph)[0]
    is_signature = "->" in sentence or re.match(r"[\w.]+\(", sentence)
    if is_signature or ">>>" in sentence or not 20 <= len(sentence) <= 300:
        return None
    if not sentence[0].isalpha() or sentence.endswith(":"):
        return None
    return sentence if sentence[-1] in ".!?" else sentence + "."


def _pick(options: tuple[str, ...], key: str) -> str:
    return options[zlib.crc32(key.encode()) % len(options)]


def _fill_with_arithmetic(
    piles: dict[str, _Pile], belongs: Callable[[str], bool], rng: random.Random
) -> None:
    for part in ("problems", "answers"):
        while not piles[part].full:
            problem = make_problem(rng)
            if not belongs(problem.key):
                continue
            if part == "problems":
                piles[part].add(problem.worked())
            elif len(problem.steps) == 1 and rng.random() < 0.5:
                piles[part].add(problem.bare())
            else:
                piles[part].add(problem.short())
