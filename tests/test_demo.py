"""The whole pipeline, in its short form."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Shared

from turbosparse.base.errors import TurboSparseError
from turbosparse.demo.run import MODELS, demo


@pytest.fixture(scope="module")
def made(shared: Shared) -> Path:
    """By the command, as a user calls it."""

    def make(out: Path) -> None:
        of_tests = ("TOKENIZERS_PARALLELISM", "TRITON_INTERPRET")
        environment = {key: value for key, value in os.environ.items() if key not in of_tests}
        command = [Path(sys.executable).with_name("turbosparse"), "demo", "--quick", "--out", out]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr
        assert "Sparsity, quality and speed" in done.stdout

    return shared("demo", make)


def test_table_shows_four_models_and_all_backends_agree(made: Path) -> None:
    result = json.loads((made / "result.json").read_text())
    rows = {row["model"]: row for row in result["rows"]}
    assert list(rows) == list(MODELS.values())
    assert result["backends_agree"]
    assert rows["dense"]["activation_sparsity"] == rows["dense control"]["activation_sparsity"] == 0
    assert rows["recovered"]["activation_sparsity"] > 0.5
    assert rows["recovered"]["tokens_seen"] == rows["dense control"]["tokens_seen"]
    assert rows["recovered"]["held_out_perplexity"] < rows["after surgery"]["held_out_perplexity"]
    assert rows["recovered"]["activated_parameters"] < rows["dense"]["activated_parameters"]
    assert all(speed > 0 for row in rows.values() for speed in row["tokens_per_second"].values())


def test_a_second_run_keeps_what_is_made(made: Path, tmp_path: Path) -> None:
    again = shutil.copytree(made, tmp_path / "again")
    before = {path: path.stat().st_mtime_ns for path in again.rglob("*.safetensors")}
    demo(out=again, quick=True)
    assert {path: path.stat().st_mtime_ns for path in again.rglob("*.safetensors")} == before
    assert not list(again.glob("*.training")), "no half-finished run is left"
    assert (again / "demo.log").read_text().count(" done in ") == 20, "ten stages, of two runs"


def test_a_folder_of_other_sizes_is_refused(made: Path) -> None:
    with pytest.raises(TurboSparseError, match="holds a demo of other sizes"):
        demo(out=made, quick=False)


def test_stages_and_the_verdict_are_told(made: Path) -> None:
    log = (made / "demo.log").read_text()
    assert log.count(" done in ") == 10, "ten stages"
    for verb in ("generate", "chat", "serve"):
        assert f"turbosparse {verb} {made}/sparse-q8 " in log
    result = json.loads((made / "result.json").read_text())
    rows = {row["model"]: row for row in result["rows"]}
    more = rows["recovered"]["held_out_perplexity"] / rows["dense control"]["held_out_perplexity"]
    side = "above" if more > 1 else "below"
    assert f"perplexity is {abs(more - 1):.1%} {side} its dense control's" in result["verdict"]
    assert "noise" in result["verdict"]
    assert Path(result["report"]) == made / "report/report.html"
    assert "<h1>Inside sparse, control</h1>" in Path(result["report"]).read_text()


@pytest.mark.parametrize("name", ["config.json", "thesis.txt"])
def test_a_folder_that_is_no_demo_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(TurboSparseError, match="exists already"):
        demo(out=tmp_path, quick=True)
    assert [path.name for path in tmp_path.iterdir()] == [name]
