"""Tasks for lm-evaluation-harness: our suites of its own tasks, and JSON-lines files, offline."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from lm_eval.tasks import TaskManager

from turbosparse.base.errors import TurboSparseError
from turbosparse.base.folders import local_path

_SUFFIX = ".jsonl"
SUITES = Path(__file__).with_name("suites")
_ACCURACY = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
# The forms of llm-foundry's files by the fields of a row. The text is the query or context, and a
# space stands before what follows it.
FORMS: dict[tuple[str, ...], dict[str, Any]] = {
    ("choices", "gold", "query"): {
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [_ACCURACY, _ACCURACY | {"metric": "acc_norm"}],
    },
    ("context_options", "continuation", "gold"): {  # the same end behind each beginning
        "output_type": "multiple_choice",
        "doc_to_text": "gold",
        "doc_to_choice": "context_options",
        "doc_to_target": "{{continuation}}",
        "metric_list": [_ACCURACY],
    },
    ("context", "continuation"): {
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{' ' + continuation}}",
        "target_delimiter": "",  # which the harness leaves out of this output type
        "metric_list": [
            _ACCURACY,
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        ],
    },
    ("answer", "chain_of_thought", "context"): {
        "output_type": "generate_until",
        "doc_to_text": "Question: {{context}}\nAnswer:",
        "doc_to_target": "{{chain_of_thought}}\n#### {{answer}}",
        "generation_kwargs": {"until": ["Question:"], "do_sample": False},
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "regexes_to_ignore": [",", "(?s).*#### "],
            }
        ],
        "filter_list": [
            {
                "name": "last-number",
                "filter": [
                    {
                        "function": "regex",
                        "group_select": -1,
                        "regex_pattern": r"(-?[0-9][0-9,]*(?:\.[0-9]+)?)",
                    },
                    {"function": "take_first"},
                ],
            }
        ],
    },
}


def open_tasks(tasks: Sequence[str], shots: int) -> tuple[TaskManager, list[Any]]:
    """The harness's loader, and what it is to load: JSON-lines files, and names of its tasks.

    Raises:
        TurboSparseError: a file of another form, or a name that the harness does not have.
    """
    named = [task for task in tasks if not task.endswith(_SUFFIX)]
    manager = TaskManager(include_path=str(SUITES), include_defaults=bool(named))
    if unknown := [name for name in named if not manager.match_tasks([name])]:
        raise TurboSparseError(
            f"task {unknown[0]!r} is unknown; give a {_SUFFIX} file, turbosparse_paper, or what "
            "`lm_eval ls tasks` lists"
        )
    files = [of_file(local_path(task), shots) for task in tasks if task.endswith(_SUFFIX)]
    return manager, [*named, *files]


def of_file(path: Path, shots: int = 0) -> dict[str, Any]:
    """The task of a JSON-lines file, with other rows of it as examples."""
    rows = _rows(path)
    fields = tuple(sorted(rows[0]))
    for number, row in enumerate(rows, 1):
        if tuple(sorted(row)) != fields or fields not in FORMS:
            known = "; ".join(", ".join(form) for form in FORMS)
            raise TurboSparseError(
                f"{path}, row {number} has the fields {', '.join(sorted(row))}; all rows must have "
                f"those of one form: {known}"
            )
    return {
        "task": path.stem,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
        "test_split": "test",
        "fewshot_split": "test",
        "num_fewshot": shots,
        **FORMS[fields],
    }


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise TurboSparseError(f"{path} cannot be read as JSON lines: {error}") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise TurboSparseError(f"{path} must hold JSON objects, one a line")
    return rows
