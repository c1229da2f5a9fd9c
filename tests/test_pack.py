"""Packing: nothing lost, nothing half-written, and the figures of `inspect`."""

from __future__ import annotations

import errno
import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import CONTEXT, EVERY, VOCABULARY, make_model, merge_predictor
from safetensors.torch import load_file, save_file

from turbosparse import pack as packing
from turbosparse.base.errors import TurboSparseError
from turbosparse.hf import families
from turbosparse.hf.count import RULE
from turbosparse.hf.load import load_config
from turbosparse.inspect import inspect, validate
from turbosparse.ops.quant import dequantise, dequantise_ffn, negative
from turbosparse.pack import pack
from turbosparse.packed.format import Packed
from turbosparse.packed.stats import Stats
from turbosparse.packed.unpack import state_dict

Make = Callable[..., Path]
F16_ROUNDING = 2**-11  # relative; below the normal range 2^-25 absolute


@pytest.fixture(scope="module")
def statistics(sparse: Make, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """statistics(family): a made-up stats.turbosparse; the highest indices are the hottest."""
    root = tmp_path_factory.mktemp("statistics")

    def file(family: str) -> Path:
        stats = Stats.empty(load_config(sparse(family)))
        stats.active += torch.arange(stats.active.shape[-1])
        stats.gate_positive += stats.active + 1
        stats.tokens += 200
        stats.nats, stats.predicted = {"corpus": 500.0}, {"corpus": 250}
        stats.corpora = {"corpus": torch.stack([stats.active.sum(-1), stats.tokens])}
        stats.save(root / f"{family}.safetensors")
        return root / f"{family}.safetensors"

    return file


@pytest.mark.parametrize("with_statistics", [False, True], ids=["model order", "hot first"])
@pytest.mark.parametrize("family", EVERY)
def test_unpacking_f16_gives_the_source_back(
    sparse: Make, statistics: Make, tmp_path: Path, family: str, with_statistics: bool
) -> None:
    stats = statistics(family) if with_statistics else None
    pack(str(sparse(family)), tmp_path / "packed", quant="f16", stats=stats)
    packed = Packed(tmp_path / "packed")
    assert packed.header.neuron_order == ("hot_first" if with_statistics else "model")
    source, unpacked = load_file(sparse(family) / "model.safetensors"), state_dict(packed)
    assert unpacked.keys() == source.keys()
    for name, tensor in source.items():
        torch.testing.assert_close(unpacked[name], tensor, rtol=F16_ROUNDING, atol=2**-25)


def test_hot_neurons_come_first(sparse: Make, statistics: Make, tmp_path: Path) -> None:
    pack(str(sparse("mixtral")), tmp_path / "packed", quant="q8", stats=statistics("mixtral"))
    order = Packed(tmp_path / "packed").tensors["model.layers.1.experts.3.neuron_order"]
    assert order.tolist() == list(range(95, -1, -1))


def test_statistics_in_the_model_folder_are_found(
    sparse: Make, statistics: Make, tmp_path: Path
) -> None:
    model = shutil.copytree(sparse("mistral"), tmp_path / "model")
    shutil.copyfile(statistics("mistral"), model / "stats.turbosparse")
    assert pack(str(model), tmp_path / "packed", quant="q8").neuron_order == "hot_first"
    profile = Packed(tmp_path / "packed").header.profile
    assert profile is not None
    assert (profile.tokens, profile.nats_per_token) == (250, 2.0)


def test_a_dense_model_packs_as_swiglu(dense: Make, tmp_path: Path) -> None:
    assert pack(str(dense("llama")), tmp_path / "packed", quant="q8").activation == "swiglu"


@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_an_ungated_feed_forward_takes_up_for_its_gate(
    sparse: Make, tmp_path: Path, activation: str
) -> None:
    """Of a model that has a gate too: it is not packed."""
    folder, out = sparse("llama", activation), tmp_path / "packed"
    pack(str(folder), out, quant="q8", predictor="sign", quant_map="down=f16")
    packed, prefix = Packed(out), "model.layers.1."
    up, down = dequantise_ffn(packed.ffn(prefix))
    source = load_file(folder / "model.safetensors")
    for found, part in ((up, "up"), (down.T, "down")):
        torch.testing.assert_close(
            found, source[f"{prefix}mlp.{part}_proj.weight"], rtol=0, atol=5e-3
        )
    assert packed.tensors[f"{prefix}pairs"].shape == (96, 2 * 64)
    signs = torch.tensor(packed.tensors[f"{prefix}predictor.signs"])
    assert torch.equal(negative(signs, 64), up < 0)
    with pytest.raises(TurboSparseError, match="the gate of this model is its up; give them one"):
        pack(str(folder), tmp_path / "no", quant_map="up=q8,gate=q4")


def test_a_model_that_was_made_sparse_packs_as_it_is(dense: Make, tmp_path: Path) -> None:
    done = pack(str(dense("nemotron")), tmp_path / "packed", quant="q4", quant_map="gate=q8")
    assert (done.activation, done.quant) == ("relu2", "q8, q k v o down q4")
    assert validate(tmp_path / "packed")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert (config["model_type"], config["hidden_act"]) == ("nemotron", "relu2")
    message = "nemotron models have no gate, which drelu reads; .* or use relu, relu2"
    with pytest.raises(TurboSparseError, match=message):
        pack(str(dense("nemotron")), tmp_path / "no", activation="drelu")


def test_what_travels_with_the_model_is_packed_too(sparse: Make, tmp_path: Path) -> None:
    pack(str(sparse("qwen2")), tmp_path / "packed", quant="q8")
    names = {path.name for path in (tmp_path / "packed").iterdir()}
    assert {"tokenizer.json", "generation_config.json", "chat_template.jinja"} <= names
    assert not {name for name in names if name.endswith(".py")}
    assert "auto_map" not in json.loads((tmp_path / "packed" / "config.json").read_text())


# --- predictors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mistral", "mixtral"])
@pytest.mark.parametrize("quant", ["f16", "q8", "q4"])
def test_a_merged_predictor_is_packed_in_the_order_of_the_neurons(
    sparse: Make, statistics: Make, tmp_path: Path, family: str, quant: str
) -> None:
    model = merge_predictor(sparse(family), tmp_path / "model", threshold=0.25, density=0.2)
    out = tmp_path / "packed"
    pack(str(model), out, stats=statistics(family), predictor_quant=quant)
    packed, source = Packed(out), load_file(model / "model.safetensors")
    last = "model.layers.1.experts.3." if family == "mixtral" else "model.layers.1."
    module = "block_sparse_moe.experts.3" if family == "mixtral" else "mlp"
    predictor = packed.predictor(last)
    assert predictor is not None
    about = predictor.about
    assert about.ranks == [[rank] * (4 if family == "mixtral" else 1) for rank in (32, 64)]
    assert (about.input, about.threshold, about.recall, about.density) == (
        "post_norm",
        0.25,
        None,
        0.2,
    )
    order = packed.tensors[f"{last}neuron_order"].tolist()
    assert order == list(range(95, -1, -1))
    error = {"f16": 1e-3, "q8": 0.01, "q4": 0.12}[quant]
    for part, rows in (("fc1", slice(None)), ("fc2", order)):
        truth = source[f"model.layers.1.{module}.predictor.{part}.weight"][rows]
        found = dequantise(torch.tensor(predictor.tensors[part]), quant, truth.shape[1])
        assert float((found - truth).norm() / truth.norm()) < error
    assert "predictor" not in json.loads((out / "config.json").read_text())
    assert validate(out)


def test_signs_are_those_of_the_packed_rows(sparse: Make, statistics: Make, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    done = pack(str(sparse("mixtral")), out, stats=statistics("mixtral"), predictor="sign")
    assert done.predictor == "sign predictor, threshold 0"
    packed, prefix = Packed(out), "model.layers.1.experts.3."
    bits = torch.tensor(packed.tensors[f"{prefix}predictor.signs"])
    for weights, half in zip(dequantise_ffn(packed.ffn(prefix))[:2], bits.chunk(2, 1), strict=True):
        assert torch.equal(negative(half, 64), weights < 0)


def test_a_merged_predictor_is_left_out_on_request(merged: Path, tmp_path: Path) -> None:
    assert pack(str(merged), tmp_path / "none", predictor="none").predictor is None
    assert Packed(tmp_path / "none").header.ffn.predictor is None
    signs = pack(str(merged), tmp_path / "sign", predictor="sign")
    assert signs.predictor == "sign predictor, threshold 0", "its own settings, not the other's"


def test_inspect_shows_the_predictor(merged: Path, tmp_path: Path) -> None:
    pack(str(merged), tmp_path / "packed")
    found = inspect(tmp_path / "packed")
    assert found.predictor == (
        "low_rank q8 predictor, threshold -1.5, recall 50.0%, rank 32 to 64, reads pre_norm"
    )
    assert found.parts["predictors"] == (32 * 80 + 96 * 48) + (64 * 80 + 96 * 80)


def edited(model: Path, copy: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    shutil.copytree(model, copy)
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


FC = "model.layers.1.mlp.predictor.fc{}.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(FC.format(2)), f"{FC.format(2)} is missing"),
        (lambda t: t.pop(FC.format(1)), f"{FC.format(1)} is missing"),
        (lambda t: t.update({FC.format(2): torch.ones(96, 32)}), r"fc2.weight is \[96, 32\], .*64"),
        (
            lambda t: t.update(
                {FC.format(1): torch.ones(33, 64), FC.format(2): torch.ones(96, 33)}
            ),
            "q8 needs rows of a multiple of 32 weights, not 33; use f16",
        ),
        (lambda t: t[FC.format(1)].fill_(torch.nan), f"{FC.format(1)}: .* does not fit q8"),
    ],
)
def test_predictors_that_are_not_whole_are_named(
    merged: Path, tmp_path: Path, change: Callable[..., object], message: str
) -> None:
    model = edited(merged, tmp_path / "model", change)
    refused(model, tmp_path / "packed", message)


@pytest.mark.parametrize(
    "block", [{"input": "mid_norm"}, {"threshold": "high"}, {"colour": 1}, {"recall": "x"}, [], 7]
)
def test_settings_of_a_predictor_that_are_not_valid_are_named(
    merged: Path, tmp_path: Path, block: object
) -> None:
    model = shutil.copytree(merged, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"predictor": block}))
    refused(model, tmp_path / "packed", 'config.json: the block "predictor" is not valid')


@pytest.mark.parametrize("activation", ["geglu", "swiglu"])
def test_what_has_no_zeros_has_nothing_to_predict(
    sparse: Make, tmp_path: Path, activation: str
) -> None:
    message = f"is a {activation} model: it has no zeros to predict; use --predictor none"
    refused(sparse("llama", activation), tmp_path / "packed", message, predictor="sign")


def test_columns_that_meet_more_are_kept_better(sparse: Make, tmp_path: Path) -> None:
    model = sparse("llama")
    stats, source = Stats.empty(load_config(model)), load_file(model / "model.safetensors")
    for sums in stats.squares.values():
        sums += 10.0 ** torch.randint(0, 4, sums.shape, generator=torch.Generator().manual_seed(0))
    stats.save(tmp_path / "stats")
    losses = {}
    for name, given in {"with": tmp_path / "stats", "without": None}.items():
        pack(str(model), tmp_path / name, quant="q4", quant_map="embedding=q4", stats=given)
        found = state_dict(Packed(tmp_path / name))
        for role in ("embedding", "q", "k", "v", "o", "gate", "up"):
            layer = None if role == "embedding" else 1
            weight = families.table(load_config(model)).name(role, layer)
            importance = stats.importance("head" if role == "embedding" else role, layer)
            losses[name, role] = float(((found[weight] - source[weight]) ** 2 @ importance).sum())
    for (name, role), loss in losses.items():
        assert loss <= losses["without", role] * (0.9 if name == "with" else 1), role


# --- inspect and validate -------------------------------------------------------------------------


@pytest.mark.parametrize("quant", ["f16", "q8", "q4"])
def test_the_parts_add_up(sparse: Make, tmp_path: Path, quant: str) -> None:
    written = pack(str(sparse("mixtral")), tmp_path / "packed", quant=quant)
    found = inspect(tmp_path / "packed")
    padding = found.bytes - sum(found.parts.values())
    tensors = len(Packed(tmp_path / "packed").plan)
    assert 0 <= padding < 4096 * (tensors + 2)
    on_disk = sum(path.stat().st_size for path in (tmp_path / "packed").glob("*.safetensors"))
    assert found.bytes == on_disk == written.bytes
    row = {"f16": 128, "q8": 80, "q4": 48}[quant]  # 64 weights, in steps of 16 bytes
    end = 80 if quant == "q4" else row  # embedding and head beside q4 are q8
    assert found.parts["feed-forward"] == 2 * 4 * (96 * 3 * row + 4 * 96)
    assert found.parts["embedding and head"] == 2 * VOCABULARY * end
    assert found.parts["norms and router"] == 4 * (5 * 64 + 2 * 4 * 64)


def test_inspect_counts_activated_parameters_by_the_rule(
    sparse: Make, statistics: Make, tmp_path: Path
) -> None:
    pack(str(sparse("mixtral")), tmp_path / "packed", quant="q8", stats=statistics("mixtral"))
    found = inspect(tmp_path / "packed")
    attention = 2 * (64 * 64) + 2 * (32 * 64)  # q and o; k and v of two heads
    layer = attention + 2 * 64 + 4 * 64  # norms and router
    ffn = 3 * 64 * 96
    active = (95 / 2) / 200  # mean of 0…95, over 200 tokens
    table = VOCABULARY * 64
    assert found.parameters == 2 * table + 2 * (layer + 4 * ffn) + 64
    assert found.activated_parameters == round(64 + table + 2 * layer + 64 + 4 * ffn * active)
    assert found.activation_sparsity == pytest.approx(1 - active)
    gates = Packed(tmp_path / "packed").header.profile.gate_positive[0][0]  # alike in all experts
    rows = 2 * 2 * 96 * (1 + gates + active)  # of two experts in two layers, 64 weights each
    assert found.read_exact == round(64 + table + 2 * layer + 64 + 64 * rows)
    assert "no predictor" in RULE


def test_inspect_says_what_the_model_is(sparse: Make, tmp_path: Path) -> None:
    pack(str(sparse("mistral")), tmp_path / "packed", quant="q4")
    found = inspect(tmp_path / "packed")
    assert (found.architecture, found.activation, found.quant) == (
        "drelu_mistral",
        "drelu",
        "q4, embedding head q8",
    )
    assert (found.layers, found.experts, found.neurons, found.hidden) == (2, 0, 96, 64)
    assert (found.context, found.source) == (CONTEXT, str(sparse("mistral")))
    assert found.activated_parameters is found.activation_sparsity is None  # no profile


def test_validate_finds_one_flipped_bit(sparse: Make, tmp_path: Path) -> None:
    pack(str(sparse("mistral")), tmp_path / "packed", quant="q8")
    whole = validate(tmp_path / "packed")
    assert (whole.folder, whole.files) == (str(tmp_path / "packed"), 1)
    assert whole.bytes == sum(p.stat().st_size for p in (tmp_path / "packed").glob("*.safetensors"))
    (path,) = (tmp_path / "packed").glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[5 * 4096 + 17] ^= 4
    path.write_bytes(data)
    Packed(tmp_path / "packed")  # opening does not read the data
    with pytest.raises(TurboSparseError, match=f"changed bytes.*{path.name}"):
        validate(tmp_path / "packed")


# --- refusals, with nothing left behind -----------------------------------------------------------


def refused(model: Path, out: Path, message: str, **options: object) -> None:
    """Packing raises `message` and leaves neither `out` nor a temporary folder."""
    before = set(out.parent.iterdir())
    with pytest.raises(TurboSparseError, match=message):
        pack(str(model), out, **options)
    assert set(out.parent.iterdir()) == before


def test_statistics_of_another_shape_are_refused(
    sparse: Make, statistics: Make, tmp_path: Path
) -> None:
    message = r"active is \[2, 4, 96\] .* needs \[2, 1, 96\]"
    refused(sparse("mistral"), tmp_path / "packed", message, stats=statistics("mixtral"))


def test_missing_statistics_are_named(sparse: Make, tmp_path: Path) -> None:
    missing = tmp_path / "none.safetensors"
    message = f"no such statistics file: {missing}; make one with `turbosparse analyse`"
    refused(sparse("mistral"), tmp_path / "packed", message, stats=missing)


@pytest.mark.parametrize("tensors", [None, {"active": torch.zeros(2, 1, 96)}])
def test_a_file_without_statistics_is_refused(
    sparse: Make, tmp_path: Path, tensors: dict[str, torch.Tensor] | None
) -> None:
    path = tmp_path / "stats.turbosparse"
    if tensors:
        save_file(tensors, path)
    else:
        path.write_bytes(b"not safetensors")
    refused(sparse("mistral"), tmp_path / "packed", f"{path} is not a statistics file", stats=path)


def with_tensor(model: Path, name: str, value: float, copy: Path) -> Path:
    shutil.copytree(model, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors[name][3, 5] = value
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "lm_head.weight"])
@pytest.mark.parametrize("value", [7e4, float("nan")])
def test_a_weight_that_does_not_fit_is_named(
    sparse: Make, tmp_path: Path, name: str, value: float
) -> None:
    model = with_tensor(sparse("mistral"), name, value, tmp_path / "model")
    refused(model, tmp_path / "packed", rf"^{name}: .*does not fit f16", quant="f16")


def test_widths_off_the_block_are_sent_to_f16(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "model", hidden_size=40, num_hidden_layers=1)
    refused(model, tmp_path / "packed", "multiple of 32 weights, not 40; use f16", quant="q4")
    pack(str(model), tmp_path / "packed", quant="f16")


def test_a_folder_that_exists_is_not_overwritten(sparse: Make, tmp_path: Path) -> None:
    (tmp_path / "packed").mkdir()
    pack(str(sparse("mistral")), tmp_path / "packed", quant="q4")  # an empty one is fine
    refused(sparse("mistral"), tmp_path / "packed", "exists already; remove it or choose another")
    assert validate(tmp_path / "packed")


def test_a_model_without_tokenizer_is_refused(sparse: Make, tmp_path: Path) -> None:
    model = shutil.copytree(sparse("mistral"), tmp_path / "model")
    (model / "tokenizer.json").unlink()
    refused(model, tmp_path / "packed", "has no tokenizer .* copy the tokenizer files")


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        (
            "mistral",
            {"ffn_activation": "gelu"},
            "ffn_activation is 'gelu'",
        ),
        ("dense", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ("dense", {"mlp_bias": True}, "mlp_bias=true is not supported"),
    ],
)
def test_feed_forwards_that_we_cannot_run_are_refused_before_work_begins(
    sparse: Make,
    dense: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    change: dict[str, object],
    message: str,
) -> None:
    source = dense("llama") if family == "dense" else sparse(family)
    model = shutil.copytree(source, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | change))
    monkeypatch.setattr(packing, "quantise", None)
    refused(model, tmp_path / "packed", message)


@pytest.mark.parametrize(
    ("stop", "seen", "message"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (OSError(errno.ENOSPC, "No space left on device"), TurboSparseError, "^disk full while"),
        (OSError(errno.EIO, "Input/output error"), OSError, "Input/output error"),
    ],
    ids=["Ctrl-C", "disk full", "disk broken"],
)
def test_an_interrupted_pack_leaves_nothing(
    sparse: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop: BaseException,
    seen: type[BaseException],
    message: str | None,
) -> None:
    calls = itertools.count()
    quantise = packing.quantise

    def quantise_and_stop(*args: object) -> torch.Tensor:
        if next(calls) == 5:
            raise stop
        return quantise(*args)

    monkeypatch.setattr(packing, "quantise", quantise_and_stop)
    with pytest.raises(seen, match=message):
        pack(str(sparse("mistral")), tmp_path / "packed")
    assert next(calls) == 6
    assert not list(tmp_path.iterdir())


def test_at_most_one_feed_forward_is_held_in_memory(
    sparse: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import weakref

    from turbosparse.hf.checkpoint import Checkpoint

    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0
    read = Checkpoint.__getitem__

    def read_and_count(self: Checkpoint, name: str) -> torch.Tensor:
        nonlocal most
        tensor = read(self, name)
        alive.add(tensor)
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(Checkpoint, "__getitem__", read_and_count)
    pack(str(sparse("mixtral")), tmp_path / "packed", quant="q8")
    assert 1 <= most <= 3


def test_the_quantisation_is_a_map(sparse: Make, tmp_path: Path) -> None:
    done = pack(
        str(sparse("mistral")), tmp_path / "p", quant="q4", quant_map="ffn=q8,down=f16,o=q8"
    )
    quants = Packed(tmp_path / "p").header.quant.model_dump()
    assert quants == {
        **dict.fromkeys(("q", "k", "v"), "q4"),
        **dict.fromkeys(("embedding", "head", "o", "gate", "up"), "q8"),
        "down": "f16",
    }
    assert done.quant == "q8, q k v q4, down f16"
    for wrong, message in {
        "nose=q8": "quant map: 'nose' is unknown; use attention, ffn, embedding",
        "head=q5": "quant map: head=q5 is unknown; use f16, q8, q4, q4_0",
        "head": "quant map 'head' is not valid; write it like head=q8,down=q8",
    }.items():
        with pytest.raises(TurboSparseError, match=re.escape(message)):
            pack(str(sparse("mistral")), tmp_path / "no", quant_map=wrong)
        assert not (tmp_path / "no").exists()
