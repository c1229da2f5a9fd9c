"""The whole line, in its short form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from turbosparse.base.errors import TurboSparseError
from turbosparse.demo.run import MODELS, demo


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "demo"
    demo(out=out, quick=True)
    return out


def test_table_shows_four_models_and_all_backends_agree(made: Path) -> None:
    result = json.loads((made / "result.json").read_text())
    rows = {row["model"]: row for row in result["rows"]}
    assert list(rows) == [name for name, _, _ in MODELS]
    assert result["backends_agree"]
    assert rows["dense"]["activation_sparsity"] == rows["dense control"]["activation_sparsity"] == 0
    assert rows["recovered"]["activation_sparsity"] > 0.5
    assert rows["recovered"]["tokens_seen"] == rows["dense control"]["tokens_seen"]
    assert rows["recovered"]["held_out_perplexity"] < rows["after surgery"]["held_out_perplexity"]
    assert rows["recovered"]["activated_parameters"] < rows["dense"]["activated_parameters"]
    assert all(speed > 0 for row in rows.values() for speed in row["tokens_per_second"].values())


def test_a_second_run_keeps_what_is_made(made: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*.safetensors")}
    demo(out=made, quick=True)
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*.safetensors")} == before
    assert not list(made.glob("*.training")), "no half-finished run is left"


def test_a_folder_of_other_sizes_is_refused(made: Path) -> None:
    with pytest.raises(TurboSparseError, match="holds a demo of other sizes"):
        demo(out=made, quick=False)
