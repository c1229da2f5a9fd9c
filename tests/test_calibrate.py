"""Calibrated surgery: of one FFN, and of a model, layer by layer."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, make_model
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import relu, silu

from turbosparse.analyse import analyse
from turbosparse.base.errors import TurboSparseError
from turbosparse.convert import convert
from turbosparse.hf import conversion
from turbosparse.hf.conversion import HELD_OUT, convert_layers, fit_layer
from turbosparse.hf.layerwise import Layerwise
from turbosparse.hf.load import load_config, load_model, load_tokenizer, threshold_of
from turbosparse.hf.reconstruct import reconstruct
from turbosparse.hf.steps import HIDDEN as STATES
from turbosparse.hf.surgery import FFN, explained, fit
from turbosparse.pack import pack
from turbosparse.packed.format import Packed

Make = Callable[..., Path]
HIDDEN, NEURONS, ROWS = 12, 20, 9000  # of rows more than are taken at a time


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense_ffn() -> tuple[Tensor, Tensor, Tensor]:
    return random(NEURONS, HIDDEN, seed=2), random(NEURONS, HIDDEN, seed=3), random(HIDDEN, NEURONS)


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (silu(x @ gate.T) * (x @ up.T)) @ down.T


def drelu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (relu(x @ gate.T) * relu(x @ up.T)) @ down.T


def alike(old: FFN, x: Tensor, neurons: int, **more: Any) -> FFN:
    """Fitted to the output of the dense one."""
    return fit(old, x, old.output(x, "swiglu"), neurons, **more)


def share_of(old: FFN, new: FFN, x: Tensor) -> float | None:
    return explained(new, x, old.output(x, "swiglu"))


# --- one FFN --------------------------------------------------------------------------------------


def explained_by(y: Tensor, truth: Tensor) -> float:
    return float(1 - (y - truth).square().sum() / (truth - truth.mean(0)).square().sum())


def test_both_halves_of_each_neuron_are_the_whole_of_it() -> None:
    """A large gate makes silu a relu, so that two dReLU neurons are one SwiGLU neuron."""
    gate, up, down = dense_ffn()
    gate *= 100
    x = random(ROWS, HIDDEN, seed=1)
    truth = swiglu(x, gate, up, down)
    old = FFN(gate, up, down)
    new = alike(old, x, 2 * NEURONS)
    assert share_of(old, new, x) == pytest.approx(1, abs=1e-4)
    assert (drelu(x, *new) - truth).norm() < 0.01 * truth.norm()
    assert (drelu(x, gate, up, down) - truth).norm() > 0.5 * truth.norm()


def test_the_half_that_adds_most_is_kept() -> None:
    """Of neurons whose up is below zero dReLU would leave nothing."""
    gate, up, down = dense_ffn()
    x, up = random(ROWS, HIDDEN, seed=1).abs(), up.abs()
    up[::2] *= -1
    old = FFN(gate, up, down)
    new = alike(old, x, NEURONS)
    assert torch.equal(new.up.sort(0).values, up.abs().sort(0).values)
    assert torch.equal(new.gate.sort(0).values, gate.sort(0).values)
    share = share_of(old, new, x)
    assert share is not None
    assert share > 0.95


def test_the_share_that_is_explained_is_that_of_the_new_output() -> None:
    weights = dense_ffn()
    x = random(ROWS, HIDDEN, seed=1)
    truth = swiglu(x, *weights)
    plain = explained_by(drelu(x, *weights), truth)
    found = []
    for neurons in (NEURONS, NEURONS * 3 // 2, NEURONS * 2):
        new = alike(FFN(*weights), x, neurons)
        assert [tuple(weight.shape) for weight in new] == [
            (neurons, HIDDEN),
            (neurons, HIDDEN),
            (HIDDEN, neurons),
        ]
        share = share_of(FFN(*weights), new, x)
        assert share == pytest.approx(explained_by(drelu(x, *new), truth), abs=1e-4)
        found.append(share)
    assert plain < found[0] < found[1] < found[2]


def test_little_text_leaves_the_rest_as_it_was() -> None:
    """One token says something of the neurons that it makes fire; the others keep their columns."""
    gate, up, down = dense_ffn()
    x = random(1, HIDDEN, seed=1)
    new = alike(FFN(gate, up, down), x, NEURONS)
    silent = (relu(x @ new.gate.T) * relu(x @ new.up.T))[0] == 0
    before = {tuple(column) for column in torch.cat([down, -down], 1).T.tolist()}
    assert 0 < silent.sum() < NEURONS
    for column in new.down.T[silent].tolist():
        assert min(math.dist(column, other) for other in before) < 1e-5


@pytest.mark.parametrize("x", [torch.zeros(0, HIDDEN), torch.zeros(3, HIDDEN)])
def test_no_text_leaves_everything_as_it_was(x: Tensor) -> None:
    weights = dense_ffn()
    new = alike(FFN(*weights), x, NEURONS)
    assert share_of(FFN(*weights), new, x) is None
    for weight, old in zip(new, weights, strict=True):
        torch.testing.assert_close(weight, old)


def test_a_few_massive_neurons_do_not_freeze_the_others() -> None:
    """One neuron in a hundred is 1,000 times as large: the rest is fitted as well as without."""
    hidden, neurons = 16, 200
    gate, up = random(neurons, hidden, seed=2), random(neurons, hidden, seed=3)
    down, x = random(hidden, neurons, seed=4), random(ROWS, hidden, seed=1)
    huge = up.clone()
    huge[:2] *= 1000
    small = down.clone()
    small[:, :2] /= 1000  # what they add stays the same
    plain, massive = FFN(gate, up, down), FFN(gate, huge, small)
    shares = [share_of(old, alike(old, x, neurons), x) for old in (plain, massive)]
    assert shares[1] == pytest.approx(shares[0], abs=2e-3)


def test_a_feed_forward_learns_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One token whose output is 1,000 times as large does not keep it from learning the others."""
    monkeypatch.setattr("turbosparse.hf.reconstruct.uses_bf16", lambda _: False)
    old, x, other = FFN(*dense_ffn()), random(4096, HIDDEN, seed=1), random(999, HIDDEN, seed=5)
    before = alike(old, x, NEURONS)
    plain = reconstruct(before, x, old.output(x, "swiglu"), 4)
    x[7] *= 30
    wanted = old.output(x, "swiglu")
    for made in (plain, reconstruct(before, x, wanted, 4)):
        assert all(weight.dtype == torch.float32 for weight in made)
        left = [1 - (share_of(old, ffn, other) or 0.0) for ffn in (before, made)]
        assert left[1] < 0.9 * left[0]
    again = reconstruct(before, x, wanted, 4)
    assert all(torch.equal(a, b) for a, b in zip(made, again, strict=True))


def test_what_does_not_help_is_not_kept(
    dense: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer that training made worse stays what the fit made of it."""

    def bad(new: FFN, *_: Any) -> FFN:
        return FFN(*(weight + 1 for weight in new))

    ids = torch.randint(0, 300, (16, 48), generator=torch.Generator().manual_seed(1))
    model = Layerwise(dense("llama"), device="cpu", dtype=torch.float32)
    fitted = convert_layers(model, ids, tmp_path / "fitted", neurons=96)
    monkeypatch.setattr(conversion, "reconstruct", bad)
    assert convert_layers(model, ids, tmp_path / "kept", neurons=96, passes=1) == fitted


def test_gates_are_scaled_so_that_one_threshold_suits_all() -> None:
    gate, up, down = dense_ffn()
    x = random(ROWS, HIDDEN, seed=1)
    for scale in (0.01, 100.0):
        old = FFN(gate * scale, up / scale, down)
        new = alike(old, x, 2 * NEURONS, cut=0.5)
        gates, whole = x @ new.gate.T, alike(old, x, 2 * NEURONS)
        assert float(gates[gates > 0].mean()) == pytest.approx(1, rel=1e-3)
        product = [ffn.gate.norm(dim=-1) * ffn.up.norm(dim=-1) for ffn in (new, whole)]
        torch.testing.assert_close(*product)
        wanted = old.output(x, "swiglu")
        fitted = explained(new, x, wanted, 0.5)
        cut_later = explained(new._replace(down=whole.down), x, wanted, 0.5)
        assert fitted is not None
        assert cut_later is not None
        assert fitted > cut_later + 0.001


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_weights_that_are_not_real_are_an_error_that_names_the_layer(value: float) -> None:
    gate, up, down = dense_ffn()
    up[3, 2] = value
    with pytest.raises(
        TurboSparseError, match="layer 7: its outputs on the text are NaN, infinite"
    ):
        alike(FFN(gate, up, down), random(ROWS, HIDDEN), NEURONS, where="layer 7")


# --- convert --------------------------------------------------------------------------------------


def outputs_of(folder: Path, corpus: Path) -> Tensor:
    """The last hidden states on the corpus."""
    model = load_model(folder, dtype=torch.float32)
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    ids = torch.tensor([load_tokenizer(folder)(" ".join(texts))["input_ids"][:150]])
    with torch.inference_mode():
        hidden: Tensor = model.model(ids).last_hidden_state
    return hidden


@pytest.mark.parametrize("family", FAMILIES)
def test_a_calibrated_model_is_nearer_to_the_dense_one(
    dense: Make, sparse: Make, corpus: Path, tmp_path: Path, family: str
) -> None:
    truth = outputs_of(dense(family), corpus)
    distance = {"plain": float((outputs_of(sparse(family), corpus) - truth).norm())}
    for widen in (1, 2):
        out = tmp_path / f"wide{widen}"
        made = convert(str(dense(family)), out, data=[corpus], widen=widen)
        distance[out.name] = float((outputs_of(out, corpus) - truth).norm())
        config = json.loads((out / "config.json").read_text())
        assert config["intermediate_size"] == 96 * widen
        assert config["ffn_activation"] == "drelu"
        assert made.explained is not None
        assert len(made.explained) == config["num_hidden_layers"]
        read = [load_file(shard) for shard in out.glob("*.safetensors")]
        assert made.parameters == sum(p.numel() for part in read for p in part.values())
    assert distance["wide2"] < 0.75 * distance["wide1"]
    assert distance["wide1"] < 0.5 * distance["plain"]
    pack(str(tmp_path / "wide2"), tmp_path / "packed", quant="f16")
    assert Packed(tmp_path / "packed").config.intermediate_size == 192


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_threshold_of_the_gates_stays_with_the_model(
    dense: Make, corpus: Path, tmp_path: Path, family: str
) -> None:
    zeros = []
    for cut in (0.0, 0.5):
        out = tmp_path / f"cut{cut}"
        convert(str(dense(family)), out, data=[corpus], reconstruct=1, gate_threshold=cut)
        assert json.loads((out / "config.json").read_text())["ffn_threshold"] == cut
        zeros.append(analyse(str(out), data=[corpus], max_tokens=400).activation_sparsity)
    assert zeros[1] > zeros[0] + 0.05
    pack(str(out), tmp_path / "packed", quant="f16")
    assert Packed(tmp_path / "packed").header.ffn.threshold == 0.5
    for activation, kept in {"drelu": 0.5, "reglu": 0.0}.items():
        assert threshold_of(load_config(out, activation)) == kept


def test_an_expert_without_text_has_gates_of_the_usual_size_too(
    dense: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the threshold is for all of them."""

    def first_two(_: Layerwise, __: Any, residual: Tensor) -> Tensor:
        return torch.tensor([0, 1]).expand(*residual.shape[:2], 2)

    monkeypatch.setattr(Layerwise, "routed", first_two)
    model = Layerwise(dense("mixtral"), device="cpu", dtype=torch.float32)
    states = model.embed(torch.randint(0, 300, (16, 48)))
    new, shares = fit_layer(model, 0, states.repeat(2, 1, 1), neurons=96, cut=0.5)
    assert [share is None for share in shares] == [False, False, True, True]
    shell = model.layer(0)
    model.attend(shell, states)
    read = model.ffn_input(shell, states).flatten(0, 1)
    for ffn in new[2:]:
        gates = read @ ffn.gate.T
        assert float(gates[gates > 0].mean()) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize(("neurons", "widen", "wide"), [(128, 1.3, 192), (96, 1.3, 125)])
def test_a_multiple_of_64_neurons_stays_one(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    neurons: int,
    widen: float,
    wide: int,
) -> None:
    source = make_model("llama", tmp_path / "dense", intermediate_size=neurons)
    loaded: list[Path] = []

    def load_once(folder: Path) -> Any:
        loaded.append(folder)
        return load_tokenizer(folder)

    monkeypatch.setattr("turbosparse.hf.load.load_tokenizer", load_once)
    convert(str(source), tmp_path / "out", data=[corpus], widen=widen)
    assert loaded == [source], "the tokenizer is loaded once"
    assert json.loads((tmp_path / "out/config.json").read_text())["intermediate_size"] == wide
    for shard in (tmp_path / "out").glob("*.safetensors"):
        shapes = {name: tensor.shape for name, tensor in load_file(shard).items()}
        assert all(shape[1] == wide for name, shape in shapes.items() if "down_proj" in name)


@pytest.mark.parametrize(
    ("options", "message"),
    {
        "too wide": ({"widen": 2.5, "data": True}, "--widen 2.5: a neuron has two halves; give a"),
        "wide without text": ({"widen": 1.5}, "--widen needs --data: text says what"),
        "trained without text": ({"reconstruct": 2}, "--reconstruct needs --data: text says what"),
        "cut without text": ({"gate_threshold": 0.5}, "--gate-threshold needs --data: text says"),
        "no threshold": ({"gate_threshold": -1, "data": True}, "--gate-threshold is -1; give 0 or"),
        "no passes": ({"reconstruct": -1, "data": True}, "--reconstruct is -1; give 0 or more"),
        "not drelu": ({"activation": "reglu", "data": True}, "leave it out with reglu"),
        "linked": ({"link": True, "data": True}, "--data changes them: leave one out"),
        "no tokens": ({"tokens": 0, "data": True}, "--tokens is 0; give at least 1"),
        "short text": ({"tokens": 150, "data": "short"}, "has fewer than 150 tokens; give more"),
    }.values(),
)
def test_what_cannot_be_calibrated(
    dense: Make, corpus: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("The small boats.")
    data = {True: [corpus], "short": [short]}.get(options.get("data", ""))
    with pytest.raises(TurboSparseError) as error:
        convert(str(dense("mistral")), tmp_path / "out", **options | {"data": data})
    assert message in str(error.value)
    assert list(tmp_path.iterdir()) == [short]


# --- layer by layer -------------------------------------------------------------------------------


def whole_model(folder: Path, ids: Tensor, neurons: int) -> dict[str, Tensor]:
    """Surgery in one forward pass of the whole model, each FFN changed just before it runs."""
    model = load_model(folder, activation="drelu", dtype=torch.float32)

    def dense(mlp: Any, inputs: tuple[Tensor, ...]) -> None:
        parts = [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        old = FFN(*(part.weight.detach() for part in parts))
        for part, weight in zip(parts, alike(old, inputs[0].flatten(0, -2), neurons), strict=True):
            part.weight = torch.nn.Parameter(weight)

    def experts(module: Any, inputs: tuple[Tensor, ...]) -> None:
        x, chosen = inputs[0], inputs[1]
        new = []
        for expert, (gate_up, down) in enumerate(
            zip(module.gate_up_proj.detach(), module.down_proj.detach(), strict=True)
        ):
            mine = x[(chosen == expert).any(-1)]
            new.append(alike(FFN(*gate_up.chunk(2), down), mine, neurons))
        module.gate_up_proj = torch.nn.Parameter(torch.stack([torch.cat(f[:2]) for f in new]))
        module.down_proj = torch.nn.Parameter(torch.stack([f.down for f in new]))

    for block in model.model.layers:
        moe = hasattr(block.mlp, "experts")
        hooked = block.mlp.experts if moe else block.mlp
        hooked.register_forward_pre_hook(experts if moe else dense)
    with torch.no_grad():
        model.model(ids, use_cache=False)
    return {name: weight.detach() for name, weight in model.state_dict().items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("neurons", [96, 128])
def test_layer_by_layer_is_the_same_as_the_whole_model_at_once(
    dense: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, neurons: int
) -> None:
    """Where no layer makes up for those before it."""
    monkeypatch.setattr("turbosparse.hf.conversion._REPAID", 0.0)
    ids = torch.randint(0, 300, (16, 48), generator=torch.Generator().manual_seed(1))
    seen = ids[torch.arange(16) % HELD_OUT != HELD_OUT - 1]
    expected = whole_model(dense(family), seen, neurons)
    model = Layerwise(dense(family), device="cpu", dtype=torch.float32)
    shares = convert_layers(model, ids, tmp_path / "work", neurons=neurons)
    assert all(share is not None and 0 < share <= 1 for layer in shares for share in layer)
    for index in range(model.config.num_hidden_layers):
        made = load_file(tmp_path / "work" / f"layer-{index:05}.safetensors")
        block = f"model.layers.{index}."
        if family != "mixtral":
            for part in ("gate", "up", "down"):
                name = f"{block}mlp.{part}_proj.weight"
                torch.testing.assert_close(made[name], expected[name], rtol=1e-3, atol=1e-4)
            continue
        moe = f"{block}block_sparse_moe.experts."
        for expert in range(4):
            gate_up = torch.cat([made[f"{moe}{expert}.w{n}.weight"] for n in (1, 3)])
            fused = expected[f"{block}mlp.experts.gate_up_proj"][expert]
            torch.testing.assert_close(gate_up, fused, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_layer_makes_up_for_those_before_it(
    dense: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Behind the last layer the states are nearer to the dense ones, on text kept apart too."""
    ids = torch.randint(0, 300, (64, 48), generator=torch.Generator().manual_seed(1))
    model, far = Layerwise(dense(family), device="cpu", dtype=torch.float32), []
    for part in (0.0, 0.5):
        monkeypatch.setattr(conversion, "_REPAID", part)
        convert_layers(model, ids, tmp_path / f"{part}", neurons=96)
        changed, truth = load_file(tmp_path / f"{part}" / STATES)["hidden"].chunk(2)
        apart = torch.arange(len(ids)) % HELD_OUT == HELD_OUT - 1
        far.append(float((changed - truth)[apart].square().mean()))
    assert far[1] < far[0]


def test_a_killed_conversion_resumes_with_what_is_finished(
    dense: Make, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    source = str(dense("mistral"))
    convert(source, tmp_path / "whole", data=[corpus], reconstruct=2)
    real, calls = conversion.fit_layer, []

    def stop_at_the_second(*given: Any, **named: Any) -> Any:
        calls.append(given[1])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*given, **named)

    monkeypatch.setattr(conversion, "fit_layer", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", data=[corpus], reconstruct=2)
    with pytest.raises(TurboSparseError, match=r"other settings \(neurons, passes\)"):
        convert(source, tmp_path / "out", data=[corpus], widen=1.5)
    convert(source, tmp_path / "out", data=[corpus], reconstruct=2)
    assert "resuming after layer 0" in capsys.readouterr().err
    assert calls == [0, 1, 1]
    assert not (tmp_path / "out.converting").exists()
    for shard in (tmp_path / "whole").glob("*.safetensors"):
        assert (tmp_path / "out" / shard.name).read_bytes() == shard.read_bytes()


def test_text_is_drawn_from_every_file(dense: Make, tmp_path: Path) -> None:
    from turbosparse.training.sample import draw

    for number in range(5):
        (tmp_path / f"{number}.txt").write_text(f"{'abcde'[number]} " * 2000)
    tokenizer = load_tokenizer(dense("mistral"))
    rows = draw([tmp_path], tokenizer, 320, tokens=320, length=32)
    texts = [tokenizer.decode(row) for row in rows]
    assert len(rows) == 10
    assert all(sum(letter in text for text in texts) == 2 for letter in "bcde")
