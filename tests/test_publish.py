"""Publishing to a stand-in of the hub: what the card says, what is uploaded, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import drelu_recipe, merge_predictor
from hub import Hub, running
from huggingface_hub import ModelCard

from turbosparse.analyse import analyse
from turbosparse.base.errors import TurboSparseError
from turbosparse.base.folders import read_config, write_json
from turbosparse.pack import pack
from turbosparse.publish import publish
from turbosparse.training.recipe import parse_recipe

REPO = "me/Boats-dReLU"
PNG = b"\x89PNG\r\n"

Make = Callable[..., Path]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub of one test's own, and a client that is logged in."""
    with running() as hub:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setenv("HF_TOKEN", "right")
        yield hub


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check that a model loads takes seconds: most tests do without it."""
    monkeypatch.setattr("turbosparse.publish._check_loads", lambda _: None)


@pytest.fixture(scope="module")
def measured(sparse: Make, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """measured(family, activation): with statistics, recipe and log; do not write into it."""
    root = tmp_path_factory.mktemp("measured")

    def folder(family: str = "mistral", activation: str = "drelu") -> Path:
        path = root / f"{family}-{activation}"
        if not path.exists():
            shutil.copytree(sparse(family, activation), path)
            analyse(str(path), data=[corpus])
            fields = drelu_recipe(path, corpus, 32, tokens=6400, batch_size=2)
            recipe = parse_recipe(fields | {"activation": activation}, "a recipe")
            write_json(path / "recipe.json", recipe.model_dump(mode="json"))
            rows = [
                {"step": n, "tokens": 64 * n, "loss": 6 - n / 25, "activation_sparsity": n / 200}
                for n in range(1, 101)
            ]
            log = "".join(json.dumps(row | {"grad_norm": 1.0}) + "\n" for row in rows)
            (path / "training_log.jsonl").write_text(log)
        return path

    return folder


def copy(model: Path, folder: Path, **fields: object) -> Path:
    shutil.copytree(model, folder)
    write_json(folder / "config.json", read_config(folder) | fields)
    return folder


def dry(model: Path, **settings: Any) -> str:
    return publish(model, repo=REPO, dry_run=True, **settings).card


# --- the card -------------------------------------------------------------------------------------


def test_a_card_says_what_was_measured(measured: Make, corpus: Path) -> None:
    found = analyse(str(measured()), data=[corpus])
    control = analyse(str(measured(activation="swiglu")), data=[corpus])
    card = dry(measured(), control=measured(activation="swiglu"), license="mit")
    perplexities = [f"{one.perplexity[str(corpus)]:.3f}" for one in (found, control)]
    sparsity = f"{found.activation_sparsity:.1%}"
    row = ["corpus.jsonl", f"{found.tokens:,}", *perplexities, sparsity]
    assert f"| {' | '.join(row)} |" in card
    assert f"For a token, {sparsity} of the neurons" in card
    assert "The control is the swiglu model, trained by the same recipe on the same tokens." in card
    layers = [1 - active for [active] in ([1 - s for s in layer] for layer in found.sparsity)]
    least, most = sorted(range(2), key=layers.__getitem__)
    assert (
        f"from {layers[least]:.1%} in layer {least} to {layers[most]:.1%} in layer {most}" in card
    )
    assert "| data | boats 100% |" in card
    log = [line for line in card.splitlines() if line.count("|") == 5][-8:]
    assert log[0] == "| 1 | 64 | 5.960 | 0.5% |"
    assert log[-1] == "| 100 | 6,400 | 2.000 | 50.0% |"
    data = ModelCard(card).data
    assert (data.license, data.base_model, data.library_name) == ("mit", None, "transformers")
    assert {"turbosparse", "drelu"} <= set(data.tags)
    assert str(corpus.parent) not in card
    assert str(measured().parent) not in card


def test_what_was_not_measured_is_not_in_a_card(sparse: Make, capsys: Any) -> None:
    card = dry(sparse("mixtral"))
    for word in ("Measured", "Training", "sparsity.png", "activated", "For a token", "license"):
        assert word not in card, word
    assert "4 experts of 96 neurons" in card
    err = capsys.readouterr().err
    assert "--base" in err
    assert "--license" in err


def test_a_dense_model_claims_no_zeros(measured: Make) -> None:
    card = dry(measured(activation="swiglu"))
    assert "perplexity" in card
    assert "sparsity.png" not in card
    assert "zero" not in card
    assert "trust_remote_code" not in card


def test_a_model_of_others_is_not_said_to_be_made_here(measured: Make, dense: Make) -> None:
    assert "It was made with TurboSparse" in dry(measured())
    card = dry(dense("qwen2"))
    assert "This Qwen2 model has swiglu feed-forwards" in card
    assert "made" not in card


def test_a_model_in_the_published_layout_needs_this_package(measured: Make, tmp_path: Path) -> None:
    card = dry(copy(measured(), tmp_path / "model", model_type="bamboo"))
    assert "from transformers" not in card
    assert "turbosparse pack me/Boats-dReLU packed" in card
    assert ModelCard(card).data.library_name == "turbosparse"


def test_a_predictor_is_named(measured: Make, tmp_path: Path) -> None:
    model = merge_predictor(
        measured(), tmp_path / "model", input="pre_norm", threshold=0.5, recall=0.991
    )
    assert "| predictor | low_rank f16 predictor, threshold 0.5, recall 99.1% |" in dry(model)


def test_the_base_and_its_licence_come_from_the_hub(
    hub: Hub, measured: Make, tmp_path: Path
) -> None:
    """A name that the hub does not know may be that of a folder: it is not told to others."""
    text = b"---\nlicense: other\nlicense_name: boats\nlanguage: en\n---\n# A boat\n"
    hub.repositories["org/boat"] = {"README.md": text}
    history = {"converted_from": "org/boat@main", "activation": "drelu"}
    data = ModelCard(dry(copy(measured(), tmp_path / "a", turbosparse=history))).data
    assert (data.base_model, data.license, data.license_name) == ("org/boat", "other", "boats")
    history["converted_from"] = "runs/boat"
    card = dry(copy(measured(), tmp_path / "b", turbosparse=history))
    assert "runs/boat" not in card
    assert ModelCard(dry(tmp_path / "b", base="org/boat")).data.license == "other"


def test_a_card_is_written_beside_its_plot(measured: Make, tmp_path: Path, capsys: Any) -> None:
    for family in ("mistral", "mixtral"):
        out = tmp_path / family
        publish(measured(family), repo=REPO, dry_run=True, out=out)
        assert (out / "README.md").read_text() == dry(measured(family))
        assert (out / "sparsity.png").read_bytes().startswith(PNG)
    with pytest.raises(TurboSparseError, match=r"README\.md exists already"):
        publish(measured(), repo=REPO, dry_run=True, out=out)
    capsys.readouterr()
    publish(measured(), repo=REPO, dry_run=True, show=print)
    assert "# Boats-dReLU" in capsys.readouterr().out


# --- the upload -----------------------------------------------------------------------------------


def test_a_model_is_uploaded_with_its_card_and_nothing_else(
    hub: Hub, measured: Make, tmp_path: Path
) -> None:
    """The check that it loads, with and without this package, included."""
    model = copy(measured(), tmp_path / "model")
    (model / "secret.env").write_text("TOKEN=1")
    (model / "checkpoint-5").mkdir()
    done = publish(model, repo=REPO, private=True)
    assert done.url == f"{hub.url}/{REPO}"
    held = hub.repositories[REPO]
    assert sorted(held) == done.files
    assert "secret.env" not in held
    assert {"README.md", "sparsity.png", "modeling_drelu.py", "model.safetensors"} <= held.keys()
    ours = {"README.md": done.card.encode(), "sparsity.png": held["sparsity.png"]}
    assert held["sparsity.png"].startswith(PNG)
    for name, content in held.items():
        assert content == (ours[name] if name in ours else (model / name).read_bytes()), name
    assert not any((model / name).exists() for name in ours), "the folder stays as it was"
    assert hub.created[0]["visibility"] == "private"


def test_a_packed_folder_is_uploaded(hub: Hub, measured: Make, tmp_path: Path) -> None:
    pack(str(measured()), tmp_path / "packed", quant="q8")
    card = publish(tmp_path / "packed", repo=REPO).card
    assert "hf download me/Boats-dReLU --local-dir packed" in card
    assert "| quantisation | q8 |" in card
    assert "| before quantising |" in card
    assert ModelCard(card).data.library_name == "turbosparse"
    assert "stats.turbosparse" not in hub.repositories[REPO]
    [weights] = (tmp_path / "packed").glob("*.safetensors")
    assert hub.repositories[REPO][weights.name] == weights.read_bytes()


@pytest.mark.usefixtures("quick")
def test_a_card_of_ones_own_is_kept(hub: Hub, measured: Make, tmp_path: Path, capsys: Any) -> None:
    model = copy(measured(), tmp_path / "model")
    (model / "README.md").write_text("# Mine\n")
    assert publish(model, repo=REPO).card == "# Mine\n"
    assert hub.repositories[REPO]["README.md"] == b"# Mine\n"
    assert "README.md is taken as it is" in capsys.readouterr().err


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_a_repository_that_exists_is_left_alone(hub: Hub, measured: Make, tmp_path: Path) -> None:
    model = copy(measured(), tmp_path / "model")
    hub.repositories[REPO] = {}
    with pytest.raises(TurboSparseError, match="exists already; choose another --repo, or add"):
        publish(model, repo=REPO)
    assert hub.repositories[REPO] == {}
    publish(model, repo=REPO, update=True)
    assert "README.md" in hub.repositories[REPO]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("token", "fails", "message"),
    [
        ("", {}, "the hub wants a token: run `hf auth login`"),
        ("wrong", {}, "the hub does not know this token"),
        ("right", {"create": 403}, f"your token may not write to {REPO}"),
        ("right", {"create": 500}, "the hub answered 500 .*not today"),
        ("right", {"commit": 413}, "the hub answered 413"),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    hub: Hub,
    measured: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    token: str,
    fails: dict[str, int],
    message: str,
) -> None:
    hub.fails |= fails
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(TurboSparseError, match=message) as error:
        publish(copy(measured(), tmp_path / "model"), repo=REPO)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("hub")
def test_a_hub_out_of_reach_is_named(measured: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(TurboSparseError, match="the hub cannot be used"):
        publish(measured(), repo=REPO)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("ffn_activation.py", "relu(gate) * relu(up)", "relu(gate) * up", "other logits"),
        ("modeling_drelu.py", "import torch\n", "import turbosparse\n", "does not load without"),
    ],
)
def test_a_model_that_others_cannot_run_is_not_uploaded(
    hub: Hub, measured: Make, tmp_path: Path, file: str, old: str, new: str, message: str
) -> None:
    model = copy(measured(), tmp_path / "model")
    code = (model / file).read_text()
    assert old in code
    (model / file).write_text(code.replace(old, new))
    with pytest.raises(TurboSparseError, match=message):
        publish(model, repo=REPO)
    assert hub.repositories == {}
    assert not (model / "README.md").exists()


def test_a_control_that_was_measured_on_other_text_is_refused(measured: Make, sparse: Make) -> None:
    with pytest.raises(TurboSparseError, match=r"was not measured on the \d+ tokens of"):
        dry(measured(), control=sparse("mistral", "swiglu"))


def test_statistics_of_another_activation_are_refused(measured: Make, tmp_path: Path) -> None:
    model = copy(measured(), tmp_path / "model", ffn_activation="reglu")
    with pytest.raises(TurboSparseError, match="statistics are of the model run as drelu"):
        dry(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repo": "boats"}, "boats is not a name of the hub; give org/name"),
        ({"base": "./dense"}, "./dense is not a name of the hub"),
        ({"out": Path("card")}, "--out is for --dry-run"),
    ],
)
def test_wrong_settings(measured: Make, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TurboSparseError, match=message):
        publish(measured(), **{"repo": REPO} | settings)


def test_a_damaged_log_is_named(measured: Make, tmp_path: Path) -> None:
    model = copy(measured(), tmp_path / "model")
    (model / "training_log.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(TurboSparseError, match=r"training_log\.jsonl is not a training log"):
        dry(model)
