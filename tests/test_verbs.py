"""The verbs as functions: a path may be a string, and ``~`` is the home folder."""

from __future__ import annotations

import json
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

VERBS = {name: target for name, (target, _) in (cli.VERBS | cli.DATA_VERBS).items()}
CALLS: list[tuple[str, dict[str, Any]]] = [
    ("convert", {"source": "~/dense", "out": "~/new", "data": ["~/text.jsonl"], "tokens": 600}),
    ("train", {"recipe": "~/recipe.yaml", "data": "~/", "out": "~/new"}),
    ("analyse", {"model": "~/dense", "data": ["~/text.jsonl"], "out": "~/new"}),
    ("pack", {"model": "~/dense", "out": "~/new", "stats": "~/stats.turbosparse"}),
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
    ("bench", {"model": "~/packed", "rounds": 1, "tokens": 1}),
    ("bench", {"shape": "toy", "folder": "~/new", "rounds": 1, "tokens": 1}),
    ("prepare", {"recipe": "~/recipe.yaml", "data": "~/", "out": "~/new", "processes": 1}),
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
    merged: Path,
    corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    (home / "dense").symlink_to(dense("mistral"))
    (home / "merged").symlink_to(merged)
    (home / "text.jsonl").symlink_to(corpus)
    recipe = drelu_recipe(dense("mistral"), Path("text.jsonl"), 16, batch_size=2, tokens=32)
    (home / "recipe.yaml").write_text(json.dumps(recipe))
    monkeypatch.setitem(
        SHAPES, "toy", SHAPES["llama-15m"] | {"vocab_size": 512, "num_hidden_layers": 1}
    )
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(elsewhere)
    return home


@pytest.mark.parametrize(("verb", "given"), CALLS, ids=[verb for verb, _ in CALLS])
def test_paths_may_be_strings(home: Path, verb: str, given: dict[str, Any]) -> None:
    if given.get("folder", given.get("model")) == "~/packed":
        pack(str(home / "dense"), home / "packed")
    if verb == "pack":
        analyse(str(home / "dense"), data=[home / "text.jsonl"], out=home)
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
