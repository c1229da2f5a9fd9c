"""Training with a teacher: what is learnt from it, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import make_model
from training_runs import Dense, assert_same_run, log_of, stop_at, write_recipe

from turbosparse.base.errors import TurboSparseError
from turbosparse.train import train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def go(tmp_path: Path, dense: Dense, corpus: Path) -> Callable[..., Path]:
    """go(name, …): train a copy of the teacher as a dReLU model."""
    copy = shutil.copytree(dense("mistral"), tmp_path / "copy")

    def run(name: str, **changes: Any) -> Path:
        changes = {"teacher": {"model": str(dense("mistral")), "weight": 1.0}} | changes
        changes = {"model": str(copy)} | changes
        recipe = write_recipe(tmp_path / f"{name}.yaml", dense, corpus, **changes)
        train(recipe, out=tmp_path / name)
        return tmp_path / name

    return run


def test_a_copy_of_the_teacher_has_nothing_to_learn(
    go: Callable[..., Path],
) -> None:
    same = log_of(go("same", activation="swiglu"))
    assert abs(same[0]["loss"]) < 1e-3
    sparse = [line["loss"] for line in log_of(go("sparse"))]
    assert 0.01 < sparse[-1] < sparse[0]


def test_the_teacher_itself_is_the_control(
    go: Callable[..., Path], dense: Dense, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = dense("mistral")  # by another of its names
    own = {"model": str(folder / ".." / folder.name), "activation": "swiglu"}
    control = go("control", **own)
    assert "would be its own teacher" in capsys.readouterr().err
    assert_same_run(control, go("plain", teacher=None, **own))


def test_a_stopped_run_resumes(go: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = go("whole")
    with monkeypatch.context() as patch:
        stop_at(patch, 7, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            go("stopped")
    assert_same_run(go("stopped"), whole)


def test_another_ones_tokens_are_refused(go: Callable[..., Path], tmp_path: Path) -> None:
    other = make_model("qwen2", tmp_path / "other")
    tokenizer = (other / "tokenizer.json").read_text(encoding="utf-8")
    (other / "tokenizer.json").write_text(tokenizer.replace('"the"', '"other"'), encoding="utf-8")
    with pytest.raises(TurboSparseError, match="tokens that the model has not"):
        go("wrong", teacher={"model": str(other)})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"shard": "full"}, "teacher and shard: full do not go together"),
        ({"lora": {}}, "teacher and lora do not go together"),
        ({"teacher": {"model": "x", "weight": 1.5}}, "teacher.weight: .*less than or equal to 1"),
    ],
)
def test_what_cannot_be(go: Callable[..., Path], changes: dict[str, Any], says: str) -> None:
    with pytest.raises(TurboSparseError, match=says):
        go("wrong", **changes)
