"""Evaluation: our engine in lm-evaluation-harness gives the scores of transformers in it."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from turbosparse.base.errors import TurboSparseError
from turbosparse.base.machine import has_accelerator
from turbosparse.evaluate import evaluate
from turbosparse.pack import pack

if not importlib.util.find_spec("lm_eval"):
    assert not os.environ.get("TURBOSPARSE_REQUIRE_EVAL")
    pytest.skip("lm-eval is missing: pip install -e '.[eval]'", allow_module_level=True)

from turbosparse.evaluation import harness
from turbosparse.evaluation.compare import Items, agreement, figure, mcnemar
from turbosparse.evaluation.subject import Cut, Subject
from turbosparse.evaluation.tasks import SUITES, of_file

# of lm-eval and what it imports
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
Make = Callable[..., Path]
WORDS = ("boats", "gulls", "small", "home", "the", "went")


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A file of each form, 12 rows long."""
    folder, draw = tmp_path_factory.mktemp("tasks"), np.random.default_rng(3)

    def words(count: int) -> str:
        return " ".join(draw.choice(WORDS, count))

    numbers = range(12)
    forms = {
        "choice": [
            {"query": words(6), "choices": [words(n) for n in (1, 2, 3)], "gold": n % 3}
            for n in numbers
        ],
        "schema": [
            {"context_options": [words(5), words(6)], "continuation": words(3), "gold": n % 2}
            for n in numbers
        ],
        "cloze": [{"context": words(9), "continuation": words(1)} for _ in numbers],
        "sums": [
            {"context": words(4), "chain_of_thought": words(3), "answer": str(n)} for n in numbers
        ],
    }
    return [write(folder / f"{name}.jsonl", rows) for name, rows in forms.items()]


@pytest.fixture(scope="module")
def packed(sparse: Make, shared: Make) -> Path:
    return shared("packed-f16", partial(pack, str(sparse("mistral")), quant="f16"))


@pytest.fixture(scope="module")
def ours(packed: Path) -> Subject:
    return Subject.open(str(packed), "exact", 1)


@pytest.fixture(scope="module")
def theirs(sparse: Make) -> Subject:
    return Subject.open(str(sparse("mistral")), "auto", None)


def test_scores_are_those_of_the_harness_own_model(
    ours: Subject, theirs: Subject, files: list[str]
) -> None:
    one, other = (of.tasks(files[:3], 2, None) for of in (ours, theirs))
    assert {metric for _, metric in one} == {"acc", "acc_norm", "perplexity"}
    assert one.keys() == other.keys()
    for key, items in one.items():
        assert len(items.values) == 12
        assert items.values == pytest.approx(other[key].values, abs=0.02), key
    cut = Cut(window=40, stride=10, max_tokens=None)
    # no text twice: of two alike that are cut differently the harness scores one wrongly
    texts = [" ".join(str(number) for number in range(60)), "the boats"]
    (a,), (b,) = (of.perplexity("corpus", texts, cut).values() for of in (ours, theirs))
    assert np.array_equal(a.weights, b.weights)
    assert a.values == pytest.approx(b.values, rel=1e-3)


@pytest.mark.parametrize("shots", [0, 1])
def test_one_space_stands_before_what_follows(
    ours: Subject, files: list[str], monkeypatch: pytest.MonkeyPatch, shots: int
) -> None:
    asked: list[tuple[str, str]] = []

    def loglikelihood(_: object, requests: list[Any], **__: object) -> list[tuple[float, bool]]:
        asked.extend(request.args for request in requests)
        return [(-1.0, False)] * len(requests)

    monkeypatch.setattr(harness.TurboSparseLM, "loglikelihood", loglikelihood)
    ours.tasks(files[:3], shots, 2)
    assert len(asked) == 2 * (3 + 2 + 1)
    for context, continuation in asked:
        assert continuation == f" {continuation.strip()}"
        assert context == context.strip()
        assert "  " not in context


def test_a_number_is_found_in_what_is_generated(
    ours: Subject, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "NEW_TOKENS", 8)
    monkeypatch.setattr(harness.TurboSparseLM, "generate_until", answer)
    found = ours.tasks(files[3:], 0, None)["sums", "exact_match, last-number"]
    assert found.values.tolist() == [0, 1, 0, 1] * 3


def answer(_: object, requests: list[Any], **__: object) -> list[str]:
    """The number of every other question, and for the others one more."""
    return [f"so 7 and 8 are\n#### {of.doc_id + (not of.doc_id % 2)}.\n" for of in requests]


def test_rolling_and_generated_texts_are_those_of_the_harness_own_model(
    ours: Subject, theirs: Subject
) -> None:
    from lm_eval.api.instance import Instance

    def asked(kind: str, *arguments: Any) -> list[Any]:
        return [
            Instance(request_type=kind, doc={}, arguments=given, idx=0)  # type: ignore[arg-type]
            for given in arguments
        ]

    texts = asked("loglikelihood_rolling", (" ".join(WORDS * 12),), ("the",))
    one, other = (of.lm.loglikelihood_rolling(texts, disable_tqdm=True) for of in (ours, theirs))
    assert one == pytest.approx(other, rel=1e-3)
    until = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
    prompts = asked("generate_until", ("the boats went", until), ("small", until))
    prompts += asked("generate_until", ("the gulls", {"max_gen_toks": 3}))
    found = ours.lm.generate_until(prompts)
    assert found == theirs.lm.generate_until(prompts, disable_tqdm=True)
    with pytest.raises(TurboSparseError, match="setting 'num_beams' is unknown; use do_sample"):
        ours.lm.generate_until(asked("generate_until", ("a", {"num_beams": 2})))
    with pytest.raises(TurboSparseError, match="generates 200 tokens, and the model's context is"):
        ours.lm.generate_until(asked("generate_until", ("a", {"max_gen_toks": 200})))


def test_the_harness_finds_the_model_and_its_chat_template(packed: Path) -> None:
    from lm_eval.api.registry import get_model

    lm = get_model("turbosparse").create_from_arg_string(
        f"pretrained={packed},mode=dense,threads=1", {"batch_size": 1, "device": "cpu"}
    )
    assert lm.model.engine.mode == "dense"
    turns = [{"role": "user", "content": "hello"}]
    assert lm.apply_chat_template(turns) == "[user] hello\n[assistant] "
    assert "for m in messages" in lm.chat_template(True)
    assert lm.tok_encode("<s>the") == lm.tok_encode("the")  # one start token


def test_suites_have_the_shots_of_the_paper() -> None:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(SUITES), include_defaults=False)
    assert {"turbosparse_paper", "turbosparse_openllm"} <= set(manager.all_groups)
    shots = {
        task["task"]: task["num_fewshot"]
        for name in ("openllm", "commonsense")
        for task in yaml.safe_load((SUITES / f"turbosparse_{name}.yaml").read_text())["task"]
    }
    assert shots == {
        "arc_challenge": 25,
        "hellaswag": 10,
        "mmlu": 5,
        "truthfulqa_mc2": 0,
        "winogrande": 5,
        "gsm8k": 8,
        **dict.fromkeys(("sciq", "piqa", "openbookqa", "arc_easy"), 0),
    }


def test_two_models_in_one_table(packed: Path, sparse: Make, files: list[str]) -> None:
    found = evaluate(
        str(packed), str(sparse("mistral")), tasks=files[:1], limit=5, mode="exact", threads=1
    )
    acc = found.figures[0]
    assert (acc.task, acc.metric, acc.items, acc.difference, acc.p) == ("choice", "acc", 5, 0, 1)
    assert acc.values[0] == acc.values[1]
    assert "drelu, transformers on " in found.ran[1]
    assert len(found.seconds) == 2


def test_a_model_agrees_with_itself(packed: Path, corpus: Path) -> None:
    found = evaluate(
        str(packed), str(packed), data=[corpus], max_tokens=300, mode="exact", threads=1
    )
    rows = {row.metric: row for row in found.figures}
    assert rows["perplexity"].values[0] == rows["perplexity"].values[1]
    assert rows["KL, nats/token"].values == [pytest.approx(0, abs=1e-6)]
    assert rows["same top-1"].values == [1.0]
    assert rows["alike of 64 greedy tokens"].values == [64.0]
    assert "at most 160 tokens" in found.rules[0]


def test_texts_of_one_name_are_told_apart(packed: Path, corpus: Path, tmp_path: Path) -> None:
    for domain in ("books", "web"):
        (tmp_path / domain).mkdir()
        shutil.copy(corpus, tmp_path / domain / "held.jsonl")
    data = [tmp_path / domain / "held.jsonl" for domain in ("books", "web")]
    found = evaluate(str(packed), data=data, max_tokens=60, mode="exact", threads=1)
    assert [row.task for row in found.figures] == ["books/held.jsonl", "web/held.jsonl"]


def test_the_divergence_of_two_models(ours: Subject, packed_mistral: Path) -> None:
    """Against the formula, on one window."""
    other = Subject.open(str(packed_mistral), "dense", 1).model
    one, ids = ours.model, list(range(2, 40))
    assert one
    assert other
    p, q = (np.concatenate(list(of.engine.logits(ids[:-1]))).astype(float) for of in (one, other))
    p, q = (np.exp(of) / np.exp(of).sum(1, keepdims=True) for of in (p, q))
    rows = {row.metric: row.values[0] for row in agreement("text", one, other, [ids])}
    assert rows["KL, nats/token"] == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-3)
    assert rows["same top-1"] == (p.argmax(1) == q.argmax(1)).mean()


def test_every_token_is_predicted_once_with_enough_before_it() -> None:
    ids = list(range(100))
    windows = list(Cut(window=20, stride=5, max_tokens=None).windows(iter([ids, [7]]), 64))
    assert [token for _, after in windows for token in after] == ids[1:]
    for number, (before, after) in enumerate(windows):
        assert [*before, *after] == ids[before[0] : after[-1] + 1]
        assert len(before) + len(after) - 1 <= 20
        assert len(before) >= (1 if not number else 16)


def test_the_paired_tests() -> None:
    right = np.array([1.0] * 12 + [0.0] * 30)
    other = np.array([0.0] * 10 + [1.0] * 4 + [0.0] * 28)  # ten lost, two won
    assert mcnemar(right, other) == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    assert mcnemar(right, right) == 1
    found = figure("t", "acc", [Items(right), Items(other)])
    assert found.errors[0] == pytest.approx((12 / 42 * 30 / 42 / 41) ** 0.5)
    random = np.random.default_rng(0)
    nats, weights = random.normal(3, 1, 400), np.full(400, 7.0)
    worse = Items(nats + 0.1 + random.normal(0, 0.1, 400), weights, perplexity=True)
    ppl = figure("t", "perplexity", [Items(nats, weights, perplexity=True), worse])
    assert ppl.values[0] == pytest.approx(np.exp(nats.mean()))
    assert ppl.errors[0] == pytest.approx(np.exp(nats.mean()) * nats.std() / 20, rel=0.1)
    assert ppl.p == pytest.approx(1e-3)  # all of 2000 resamples
    unlike = figure("t", "perplexity", [Items(nats, weights), Items(nats, weights + 1)])
    assert unlike.p is None  # another tokenizer


def test_what_is_missing_is_named(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "turbosparse.evaluation.subject", None)
    with pytest.raises(TurboSparseError, match=r"pip install 'turbosparse\[eval\]'"):
        evaluate(str(packed), tasks=["a.jsonl"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"query": "a", "choices": ["b"], "gold": 0}\n{"text": "c"}', "row 2 has the fields text"),
        ("{broken", "cannot be read as JSON lines"),
        ("", "must hold JSON objects, one a line"),
    ],
)
def test_a_file_of_no_known_form(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "task.jsonl").write_text(text)
    with pytest.raises(TurboSparseError, match=message):
        of_file(tmp_path / "task.jsonl")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give --tasks, --data or both"),
        ({"tasks": ["a.jsonl"], "limit": 0}, "--limit is 0; give at least 1"),
        ({"tasks": ["no/such.jsonl"]}, "no/such.jsonl cannot be read"),
    ],
)
def test_bad_arguments(packed: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TurboSparseError, match=message):
        evaluate(str(packed), **arguments)


@pytest.mark.parametrize("wrong", [{"other": "./no/model"}, {"data": ["no/text"]}])
def test_what_is_missing_is_found_before_the_first_question(
    packed: Path, files: list[str], monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any]
) -> None:
    monkeypatch.setattr(Subject, "tasks", lambda *_: pytest.fail("a question was asked"))
    with pytest.raises(TurboSparseError, match="no such"):
        evaluate(str(packed), tasks=files, **wrong)


def test_a_packed_model_on_the_card(packed: Path, tmp_path: Path) -> None:
    """In Triton's interpreter, where there is none."""
    pytest.importorskip("triton")
    text = tmp_path / "text.txt"
    text.write_text("the boats went home and the small gulls went home")
    core, card = (evaluate(str(packed), data=[text], device=where) for where in ("cpu", "cuda"))
    assert "backend cpu" in core.ran[0]
    assert "backend gpu" in card.ran[0]
    assert card.figures[0].values == pytest.approx(core.figures[0].values, rel=1e-3)


def test_without_a_card_it_is_named(sparse: Make, corpus: Path) -> None:
    if has_accelerator():
        pytest.skip("there is a card")
    folder = sparse("mistral")
    for run in (
        partial(evaluate, str(folder), data=[corpus], device="cuda"),
        partial(pack, str(folder), folder.parent / "none", data=[corpus], device="cuda"),
    ):
        with pytest.raises(TurboSparseError, match="--device cuda: torch finds no GPU"):
            run()
