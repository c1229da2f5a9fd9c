"""Training with the predictor in the loop: what it adds, that both learn, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Shared, drelu_recipe, merge_predictor
from safetensors.torch import load_file
from training_runs import assert_same_run, log_of, stop_at

from turbosparse.base.errors import TurboSparseError
from turbosparse.base.folders import read_config
from turbosparse.hf.load import load_model
from turbosparse.predictors.loop import Loop
from turbosparse.predictors.mask import predicted
from turbosparse.train import train

Make = Callable[..., Path]
Go = Callable[..., Path]
STEP = 4 * 32  # tokens
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="session")
def holding(sparse: Make, shared: Shared) -> Make:
    """holding(family): a toy dReLU model with a random predictor; do not write into it."""

    def folder(family: str = "mistral") -> Path:
        block = {"kind": "low_rank", "input": "post_norm", "threshold": 20.0, "perplexity": 1.01}
        make = lambda copy: merge_predictor(sparse(family), copy, **block)  # noqa: E731
        return shared(f"loop-{family}", make)

    return folder


@pytest.fixture
def go(tmp_path: Path, holding: Make, corpus: Path) -> Go:
    """go(name, steps=, family=, share=, …): train a model with its predictor into `name`."""

    def run(
        name: str, steps: int = 4, family: str = "mistral", share: float = 1.0, **changes: Any
    ) -> Path:
        given = {"tokens": steps * STEP, "batch_size": 4, "predictor": {"share": share}}
        given |= {"router_aux_loss_coef": 0.0} | changes
        recipe = drelu_recipe(holding(family), corpus, 32, **given)
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        train(path, out=tmp_path / name)
        return tmp_path / name

    return run


@pytest.mark.parametrize("family", ["mistral", "mixtral"])
def test_the_loss_is_that_of_the_model_with_its_mask(
    go: Go, holding: Make, batches: list[torch.Tensor], family: str
) -> None:
    model = load_model(holding(family))
    logs = {share: log_of(go(f"share-{share}", 1, family, share))[0] for share in (0, 1)}
    found = {}
    with torch.no_grad():
        found[0] = float(model(batches[0], labels=batches[0]).loss)
        with predicted(model, holding(family)):
            found[1] = float(model(batches[0], labels=batches[0]).loss)
    assert abs(found[1] - found[0]) > 0.01
    for share, log in logs.items():
        assert log["loss"] - log["loss/predictor"] == pytest.approx(found[share], rel=1e-4)
    assert logs[0]["loss/predictor"] == pytest.approx(logs[1]["loss/predictor"], rel=0.2)


def test_the_tokens_say_which_neurons_to_find(holding: Make) -> None:
    """The loss of the tokens reaches a neuron that is active but no candidate, and no other."""
    model = load_model(holding())
    loop = Loop(model, holding(), weight=1.0, carry=1.0, first=3, device="cpu")
    ids = torch.arange(4, 44).reshape(2, 20)
    for step, masked in ((2, False), (3, True)):
        loop.clear_gradients()
        with loop.watch(model, step) as sums:
            model(ids, labels=ids).loss.backward()
        assert [count for _, count in sums] == [40 * 96] * 2
        assert any(part.grad.any() for part in loop.parameters() if part.grad is not None) == masked


def test_both_learn_and_the_folder_holds_the_new_predictor(go: Go, holding: Make) -> None:
    out = go("out", 12, share=0.5, learning_rate=5e-3)
    log = log_of(out)
    assert log[-1]["loss/predictor"] < 0.8 * log[0]["loss/predictor"]
    assert log[6]["activation_sparsity"] > log[5]["activation_sparsity"], "half of it is masked"
    block = read_config(out)["predictor"]
    assert block == {"kind": "low_rank", "input": "post_norm", "threshold": 20.0}
    was = load_file(holding() / "model.safetensors")
    stored = load_file(out / "predictor.safetensors")
    assert stored.keys() == {name for name in was if ".predictor." in name}
    for name, part in stored.items():
        assert 0.01 < (part - was[name]).norm() / was[name].norm() < 1
    with torch.no_grad(), predicted(model := load_model(out), out):
        model(torch.arange(4, 44)[None])


def test_a_stopped_run_ends_as_one_that_never_stopped(
    go: Go, monkeypatch: pytest.MonkeyPatch
) -> None:
    often = partial(go, steps=6, share=0.5, checkpoint_every=2, l1={"weight": 1.0})
    whole = often("whole")
    with monkeypatch.context() as patch:
        stop_at(patch, 4, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            often("out")
    assert_same_run(often("out"), whole)
    name = "predictor.safetensors"
    assert (whole / name).read_bytes() == (whole.with_name("out") / name).read_bytes()


def test_the_dense_control_and_a_recipe_without_it_leave_the_predictor_alone(
    go: Go, holding: Make
) -> None:
    control = go("control", 1, activation="swiglu")
    assert "loss/predictor" not in log_of(control)[0]
    assert not (control / "predictor.safetensors").exists()
    kept = load_file(go("kept", 1, predictor=None) / "predictor.safetensors")
    was = load_file(holding() / "model.safetensors")
    assert all(torch.equal(part, was[name]) for name, part in kept.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"predictor": {"share": 2}}, r"predictor\.share: Input should be less than or equal to 1"),
        ({"predictor": {"weight": 0}}, r"predictor\.weight: Input should be greater than 0"),
        ({"gradient_checkpointing": True}, "predictor and gradient_checkpointing do not go tog"),
        ({"shard": "full"}, "predictor and shard: full do not go together"),
        ({"lora": {}}, "predictor and lora do not go together"),
        ({"model": {"model_type": "mistral"}}, "predictor is that of a model folder"),
        ({"model": "none"}, "holds no predictor; make one with `turbosparse predictor train`"),
        ({"model": "sign"}, "holds a predictor of the kind sign, which has nothing to train"),
    ],
)
def test_where_it_cannot_work_is_said(
    go: Go, sparse: Make, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    if changes.get("model") == "none":
        changes = {"model": str(sparse("mistral"))}
    if changes.get("model") == "sign":
        folder = merge_predictor(sparse("mistral"), tmp_path / "sign", kind="sign")
        changes = {"model": str(folder)}
    with pytest.raises(TurboSparseError, match=message):
        go("out", **changes)
    assert not [path for path in tmp_path.glob("out*") if path.is_dir()]
