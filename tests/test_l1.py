"""L1 by hand, that it does what it says, and what else changes Combined."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import yaml
from conftest import drelu_recipe

from turbosparse.analysis.measure import measure
from turbosparse.base.errors import TurboSparseError
from turbosparse.hf.change import change_combined, force_sparsity
from turbosparse.hf.load import load_model, load_tokenizer
from turbosparse.hf.observe import observe_ffn
from turbosparse.train import train
from turbosparse.training.l1 import ramp
from turbosparse.training.readers import documents

LENGTH, BATCH, STEPS = 32, 4, 6
TOKENS = torch.arange(4, 44).reshape(2, 20)
Make = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(tmp_path: Path, dense: Make, corpus: Path) -> Callable[..., list[dict[str, float]]]:
    """run(name, **changes): train the dense model as a dReLU one into `name`; return its log."""

    def go(name: str, family: str = "mistral", **changes: Any) -> list[dict[str, float]]:
        given = {"tokens": STEPS * BATCH * LENGTH, "batch_size": BATCH}
        given |= changes
        fields = drelu_recipe(dense(family), corpus, LENGTH, **given)
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(fields))
        train(path, out=tmp_path / name)
        return log_of(tmp_path / name)

    return go


Run = Callable[..., list[dict[str, float]]]


def log_of(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "training_log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(TOKENS).logits
    return logits


# --- L1 -------------------------------------------------------------------------------------------


def test_the_weight_of_l1_grows_along_half_a_cosine() -> None:
    assert [ramp(step, 4) for step in (0, 2, 4, 9)] == pytest.approx([0, 0.5, 1, 1])
    assert ramp(1, 4) == pytest.approx((1 - math.cos(math.pi / 4)) / 2)
    assert ramp(0, 0) == 1


def test_a_model_without_zeros_goes_without_it(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {"tokens": BATCH * LENGTH, "activation": "swiglu"}
    log = run("l1", **own, l1={"weight": 3})
    assert "swiglu has no zeros: the recipe's l1 is left out" in capsys.readouterr().err
    assert log == run("without", **own)


@pytest.mark.parametrize("family", ["mistral", "mixtral"])
def test_l1_is_the_mean_of_combined(
    run: Run, dense: Make, batches: list[torch.Tensor], family: str
) -> None:
    one = BATCH * LENGTH
    (plain,) = run("plain", family, tokens=one)
    batches.clear()
    (logged,) = run("l1", family, tokens=one, l1={"weight": 3})

    sums: list[torch.Tensor] = []
    with (
        torch.no_grad(),
        observe_ffn(
            model := load_model(dense(family), activation="drelu"),
            lambda seen: sums.append(seen.combined.flatten()),
        ),
    ):
        model(batches[0])
    assert logged["loss/l1"] == pytest.approx(3 * float(torch.cat(sums).mean()), rel=1e-5)
    assert logged["loss"] == pytest.approx(plain["loss"] + logged["loss/l1"], rel=1e-5)


@pytest.mark.parametrize("family", ["mistral", "mixtral"])
def test_l1_raises_the_sparsity(run: Run, tmp_path: Path, corpus: Path, family: str) -> None:
    longer = {"tokens": 12 * BATCH * LENGTH, "learning_rate": 5e-3}
    run("plain", family, **longer)
    log = run("l1", family, **longer, l1={"weight": 30, "warmup_steps": 3})
    assert log[0]["loss/l1"] == 0
    assert log[3]["loss/l1"] > log[1]["loss/l1"] > 0
    assert log[-1]["loss/l1"] < log[3]["loss/l1"]
    texts = {"boats": list(documents(corpus))[-4:]}
    plain, pressed = (
        measure(load_model(folder), load_tokenizer(folder), texts).activation_sparsity()
        for folder in (tmp_path / "plain", tmp_path / "l1")
    )
    assert pressed > plain + 0.02


PRESSED = {"l1": {"weight": 3.0, "warmup_steps": 2}}


def assert_same_losses(one: list[dict[str, float]], other: list[dict[str, float]]) -> None:
    for key in ("loss", "loss/l1", "grad_norm"):
        values = [[row[key] for row in log] for log in (one, other)]
        assert values[0] == pytest.approx(values[1], rel=2e-3), key


def test_the_split_into_micro_batches_changes_nothing(run: Run) -> None:
    assert_same_losses(run("one", **PRESSED), run("four", micro_batch_size=1, **PRESSED))


def test_two_processes_train_as_one_does(run: Run, tmp_path: Path) -> None:
    one = run("one", **PRESSED)
    script = tmp_path / "two.py"
    script.write_text(
        "from pathlib import Path\nfrom turbosparse.train import train\n"
        f"train(Path({str(tmp_path / 'one.yaml')!r}), out=Path({str(tmp_path / 'two')!r}))\n"
    )
    processes.run(script, 2)
    two = log_of(tmp_path / "two")
    for key in ("loss", "loss/l1", "grad_norm"):
        assert [row[key] for row in two] == pytest.approx([row[key] for row in one], rel=5e-3), key


def test_a_stopped_run_goes_on_where_it_was(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from turbosparse.training.trainer import SparseTrainer

    whole = run("whole", **PRESSED, checkpoint_every=2)
    step, count = SparseTrainer.training_step, 0

    def training_step(self: Any, *args: Any) -> Any:
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(SparseTrainer, "training_step", training_step)
        with pytest.raises(KeyboardInterrupt):
            run("out", **PRESSED, checkpoint_every=2)
    assert run("out", **PRESSED, checkpoint_every=2) == whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"l1": {"weight": 0}}, r"l1\.weight: Input should be greater than 0"),
        ({"l1": {"power": 1}}, r"l1\.weight: Field required"),
    ],
)
def test_a_mistake_is_named(run: Run, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TurboSparseError, match=message):
        run("out", **changes)


def test_layers_that_are_run_again_for_their_gradients_are_refused(run: Run) -> None:
    with pytest.raises(TurboSparseError, match="gradient_checkpointing runs the layers again"):
        run("out", gradient_checkpointing=True, **PRESSED)


# --- changing Combined ----------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["drelu", "swiglu"])
def test_a_token_keeps_its_largest_entries(sparse: Make, activation: str) -> None:
    model = load_model(sparse("mistral", activation)).eval()
    before = logits_of(model)
    seen: list[torch.Tensor] = []
    with force_sparsity(model, 0.75):
        handle = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(
            lambda _module, inputs: seen.append(inputs[0])
        )
        after = logits_of(model)
        handle.remove()
    mlp, inputs = model.model.layers[0].mlp, []
    handle = mlp.down_proj.register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    assert torch.equal(logits_of(model), before), "nothing is left behind"
    handle.remove()
    for kept, whole in zip(seen[0].flatten(0, 1), inputs[0].flatten(0, 1), strict=True):
        count = len(whole) // 4
        assert torch.equal(kept[kept != 0], whole[kept != 0])
        assert int((kept != 0).sum()) <= count
        least = float(whole.abs().sort(descending=True).values[count - 1])
        assert torch.equal(kept != 0, (whole.abs() >= least) & (whole != 0))
    assert not torch.equal(after, before)


@pytest.mark.parametrize("activation", ["drelu", "swiglu"])
def test_every_experts_implementation_is_changed_alike(sparse: Make, activation: str) -> None:
    model = load_model(sparse("mixtral", activation)).eval()
    found = []
    for implementation in ("grouped_mm", "batched_mm", "eager"):
        model.set_experts_implementation(implementation)
        if activation == "swiglu" and implementation == "eager":
            with (
                pytest.raises(ValueError, match="eager experts never show Combined"),
                force_sparsity(model, 0.5),
            ):
                pass
            continue
        plain = logits_of(model)
        with force_sparsity(model, 0.0):
            assert torch.equal(logits_of(model), plain)
        with force_sparsity(model, 0.8):
            found.append(logits_of(model))
        assert torch.equal(logits_of(model), plain), "nothing is left behind"
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["mistral", "mixtral"])
def test_what_stands_in_for_combined_has_its_gradients(sparse: Make, family: str) -> None:
    model = load_model(sparse(family))
    norms: list[torch.Tensor] = []

    def change(active: torch.Tensor) -> torch.Tensor:
        norms.append(active.sum())
        return active

    with change_combined(model, change):
        model(TOKENS)
    sum(norms).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert any("gate" in name for name in gradients)
    assert len(norms) >= 2
