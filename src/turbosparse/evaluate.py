"""Quality: perplexity, tasks, and how far two models agree, with errors and paired tests.

Tasks run in lm-evaluation-harness (the extra `eval`), through our engine for a packed folder and
through transformers for any other. Two models see the same items, so that a difference is tested
item by item.

    turbosparse evaluate dense-q4 sparse-q4 --tasks arc_easy.jsonl --data held_out.txt
    turbosparse evaluate sparse-q4 --tasks turbosparse_paper
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbosparse.base.errors import TurboSparseError
from turbosparse.base.folders import AnyPath, local_path
from turbosparse.base.machine import Device
from turbosparse.engine.api import Model
from turbosparse.engine.engine import Mode
from turbosparse.training.readers import corpus_files, documents

if TYPE_CHECKING:
    from turbosparse.evaluation.compare import Figure


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured of one model or of two."""

    models: list[str]
    ran: list[str]
    seconds: list[float]  # of each model's perplexity and tasks
    figures: list[Figure]
    rules: list[str]

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        names = [Path(model).name for model in self.models]
        two = len(names) == 2
        table = Table("task", "metric", "items", *names, *(["difference", "p"] if two else []))
        for row in self.figures:
            cells = [
                f"{value:#.4g}" + ("" if error is None else f" ± {error:#.2g}")
                for value, error in zip(row.values, row.errors, strict=True)
            ]
            cells += [""] * (len(names) - len(cells))
            if row.difference is not None and row.p is not None:
                cells += [f"{row.difference:+#.3g}", f"{row.p:.2g}"]
            table.add_row(row.task, row.metric, str(row.items), *cells)
        ran = [
            f"{model}: {how}, {seconds:.1f} s"
            for model, how, seconds in zip(self.models, self.ran, self.seconds, strict=True)
        ]
        return Group(*ran, table, *self.rules)


def evaluate(
    model: str,
    other: str | None = None,
    *,
    tasks: Sequence[str] = (),
    data: Sequence[AnyPath] = (),
    shots: int = 0,
    limit: int | None = None,
    window: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    mode: Mode = "auto",
    other_mode: Mode | None = None,
    threads: int | None = None,
    device: Device = "auto",
) -> Evaluation:
    """Measure the quality of a model, or of two side by side, with errors and paired tests.

    Parameters
    ----------
    model
        Packed folder, run by the engine; or model folder, GGUF file or hub id, run by transformers.
    other
        A second one, which sees the same items.
    tasks
        JSON-lines file, whose rows have the fields of one of llm-foundry's forms; or the name of a
        task of lm-evaluation-harness, which downloads its data. turbosparse_paper is the paper's
        tasks with its shots, turbosparse_openllm and turbosparse_commonsense its two parts.
    data
        Held-out text, JSON-lines or .gz file, or a folder of them, for the perplexity and the
        agreement of two packed folders.
    shots
        Solved examples before each question of a JSON-lines task, drawn from its other rows.
    limit
        Only the first items of each task, this many.
    window
        Tokens of context at most, for the perplexity; by default the model's own, up to 1024.
    stride
        Tokens that a window predicts; by default half of it. The others are context.
    max_tokens
        Stop each corpus after about this many tokens.
    mode
        Of a packed folder: exact, predicted or dense.
    other_mode
        Of the second model; by default the same.
    threads
        Of the engine; by default all processors of this process.
    device
        auto takes a GPU, if there is one, for models that transformers runs, and the processor for
        packed folders; with cuda these take it, too.
    """
    if not tasks and not data:
        raise TurboSparseError("give --tasks, --data or both")
    for flag, value in {"limit": limit, "window": window, "stride": stride}.items():
        if value is not None and value < 1:
            raise TurboSparseError(f"--{flag} is {value}; give at least 1, or leave it out")
    try:
        from turbosparse.evaluation import compare
        from turbosparse.evaluation.subject import Cut, Subject
    except ImportError as error:
        raise TurboSparseError(
            "evaluate needs lm-evaluation-harness: pip install 'turbosparse[eval]'"
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    corpora = _named([local_path(source) for source in data])
    cut = Cut(window, stride, max_tokens)
    sources = [(model, mode), *([(other, other_mode or mode)] if other else [])]
    for corpus in corpora.values():
        corpus_files(corpus)  # raises if there is none: before an hour of questions, not after it
    subjects = [Subject.open(source, how, threads, device) for source, how in sources]
    measured, seconds = [], []
    for subject in subjects:
        began = time.perf_counter()
        found = subject.tasks(tasks, shots, limit)
        for name, corpus in corpora.items():
            found |= subject.perplexity(name, documents(corpus), cut)
        measured.append(found)
        seconds.append(time.perf_counter() - began)
    figures = [compare.figure(*key, [found[key] for found in measured]) for key in measured[0]]
    match [subject.model for subject in subjects]:
        case [Model() as one, Model() as two]:
            for name, corpus in corpora.items():
                windows = cut.side_by_side(documents(corpus), one, two)
                figures += compare.agreement(name, one, two, windows)
    rules = [compare.TESTS]
    if corpora:
        rules.insert(0, cut.rule(min(subject.lm.max_length for subject in subjects)))
    return Evaluation(
        models=[source for source, _ in sources],
        ran=[subject.ran for subject in subjects],
        seconds=seconds,
        figures=figures,
        rules=rules,
    )


def _named(paths: list[Path]) -> dict[str, Path]:
    """By the last parts of each, as many as tell all of them apart."""
    whole = {path.absolute() for path in paths}
    for count in range(1, max((len(path.parts) for path in whole), default=1) + 1):
        names = {"/".join(path.absolute().parts[-count:]): path for path in paths}
        if len(names) == len(whole):
            break
    return names
