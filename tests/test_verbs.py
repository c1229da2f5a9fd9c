"""The verbs as functions: a path may be a string, and ``~`` is the home folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from conftest import drelu_recipe

from turbosparse import cli
from turbosparse.analyse import analyse
from turbosparse.base.errors import TurboSparseError
from turbosparse.pack import pack
from turbosparse.packed.synthetic import SHAPES

GROUPED = {
    f"{group} {name}": verb
    for group, (_, verbs) in cli.GROUPS.items()
    for name, verb in verbs.items()
}
VERBS = {name: target for name, (target, _) in (cli.VERBS | GROUPED).items()}
CALLS: list[tuple[str, dict[str, Any]]] = [
    ("convert", {"source": "~/dense", "out": "~/new", "data": ["~/text.jsonl"], "tokens": 600}),
    ("train", {"recipe": "~/recipe.yaml", "data": "~/", "out": "~/new"}),
    ("analyse", {"model": "~/dense", "data": ["~/text.jsonl"], "out": "~/new"}),
    ("analyse", {"model": "~/sparse", "add": ["~/stats.turbosparse"], "out": "~/new"}),
    ("report", {"models": ["~/stats.turbosparse"], "out": "~/new"}),
    (
        "pack",
        {
            "model": "~/sparse",
            "out": "~/new",
            "stats": "~/stats.turbosparse",
            "predictor": "sign",
            "data": ["~/text.jsonl"],
        },
    ),
    ("export", {"model": "~/merged", "out": "~/new", "to": "predictor-pt"}),
    (
        "publish",
        {
            "model": "~/merged",
            "repo": "me/boats",
            "control": "~/dense",
            "dry_run": True,
            "out": "~/new",
        },
    ),
    ("inspect", {"folder": "~/packed"}),
    ("validate", {"folder": "~/packed"}),
    ("generate", {"model": "~/packed", "prompt": "The", "max_tokens": 1}),
    ("evaluate", {"model": "~/packed", "data": ["~/text.jsonl"], "max_tokens": 50}),
    ("count", {"model": "~/sparse", "stats": "~/stats.turbosparse", "bandwidth": 1.0}),
    ("plan", {"model": "~/packed", "stats": "~/stats.turbosparse", "sparsity": 0.5}),
    ("bench", {"model": "~/packed", "rounds": 1, "tokens": 1}),
    ("bench", {"shape": "toy", "folder": "~/new", "rounds": 1, "tokens": 1}),
    ("data prepare", {"recipe": "~/recipe.yaml", "data": "~/", "out": "~/new", "processes": 1}),
    (
        "predictor train",
        {"model": "~/sparse", "out": "~/new", "data": ["~/text.jsonl"], "kind": "sign"},
    ),
    (
        "predictor score",
        {"models": ["~/signs"], "data": ["~/text.jsonl"], "picture": "~/new.png", "targets": [0.9]},
    ),
    # it is enough that these look at the right place
    ("demo", {"out": "~/text.jsonl"}),
    ("chat", {"model": "~/dense"}),
    ("serve", {"packed": ["~/dense"]}),
]
REFUSED = ("demo", "chat", "serve")


def function(verb: str) -> Callable[..., Any]:
    module, name = VERBS[verb].split(":")
    found: Callable[..., Any] = getattr(import_module(module), name)
    return found


@pytest.fixture
def home(
    tmp_path: Path,
    dense: Callable[[str], Path],
    sparse: Callable[..., Path],
    merged: Path,
    corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    (home / "dense").symlink_to(dense("mistral"))
    (home / "merged").symlink_to(merged)
    (home / "sparse").symlink_to(sparse("mistral"))
    (home / "text.jsonl").symlink_to(corpus)
    recipe = drelu_recipe(dense("mistral"), Path("text.jsonl"), 16, batch_size=2, tokens=32)
    (home / "recipe.yaml").write_text(json.dumps(recipe))
    monkeypatch.setitem(
        SHAPES, "toy", SHAPES["llama-15m"] | {"vocab_size": 512, "num_hidden_layers": 1}
    )
    monkeypatch.setattr("turbosparse.benchmark.disk.SECONDS", 0.001)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(elsewhere)
    return home


@pytest.mark.parametrize(("verb", "given"), CALLS, ids=[verb for verb, _ in CALLS])
def test_paths_may_be_strings(home: Path, verb: str, given: dict[str, Any]) -> None:
    if given.get("folder", given.get("model")) == "~/packed":
        pack(str(home / ("sparse" if verb == "plan" else "dense")), home / "packed")
    if verb == "predictor score":  # it writes into the model
        shutil.copytree(home / "sparse", home / "signs")
        config = json.loads((home / "signs/config.json").read_text())
        config["predictor"] = {"kind": "sign"}
        (home / "signs/config.json").write_text(json.dumps(config))
    if verb == "evaluate":
        pytest.importorskip("lm_eval")
    if verb in ("pack", "count", "report", "plan") or "add" in given:
        analyse(str(home / "sparse"), data=[home / "text.jsonl"], out=home)
    if verb in REFUSED:
        with pytest.raises(TurboSparseError, match=r"^/\S*/(text.jsonl exists|dense\S* is not)"):
            function(verb)(**given)
    else:
        assert function(verb)(**given)
    assert (home / "new").is_dir() == ("~/new" in given.values())
    assert not list(Path().iterdir()), "nothing may be written into a folder that is called ~"


@pytest.mark.parametrize("verb", VERBS)
def test_every_path_of_every_verb_is_tried(verb: str) -> None:
    hints = get_type_hints(function(verb))
    paths = {name for name in signature(function(verb)).parameters if "Path" in str(hints[name])}
    given = [call.items() for name, call in CALLS if name == verb]
    assert paths <= {name for call in given for name, value in call if "~" in str(value)}
