"""Sparse models as others publish them: read, run and converted as their authors meant them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from greedy import greedy, of_transformers
from published import (
    ACTIVATION,
    CONFIGS,
    IM_END,
    LAYERS,
    RANKS,
    READS,
    ffns,
    formula,
    publish,
    rounded,
    tensors_of,
)
from safetensors.torch import save_file

from turbosparse.analyse import analyse
from turbosparse.base.errors import TurboSparseError
from turbosparse.convert import convert
from turbosparse.engine.engine import Engine
from turbosparse.engine.text import Tokenizer
from turbosparse.export import export
from turbosparse.generate import generate
from turbosparse.hf.config import read_model_config
from turbosparse.hf.load import load_config, load_model, load_tokenizer, save_model
from turbosparse.inspect import inspect
from turbosparse.ops import BACKENDS
from turbosparse.pack import pack
from turbosparse.packed.format import Packed

Make = Callable[[str], Path]
SAME = 3e-3  # relative RMS of logits: f16 weights, and keys and values in half precision
OTHER = 3e-2  # what a wrong formula gives at least
PROMPT = [1, 270, 280, 265, 290, 275, 261, 288]
PROMPTS = [[1, *(token - first for token in PROMPT[1:])] for first in range(40)]
TOKENS = 30


def relative_rms(value: Any, truth: torch.Tensor) -> float:
    return float((torch.as_tensor(value) - truth).norm() / truth.norm())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """source(kind): a tiny published model; do not write into it."""
    root = tmp_path_factory.mktemp("published")
    return lambda kind: root / kind if (root / kind).exists() else publish(kind, root / kind)


@pytest.fixture(scope="module")
def ours(source: Make, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """ours(kind): the same, converted."""
    root = tmp_path_factory.mktemp("ours")

    def folder(kind: str) -> Path:
        if not (root / kind).exists():
            convert(str(source(kind)), root / kind, activation=ACTIVATION.get(kind))  # type: ignore[arg-type]
        return root / kind

    return folder


@pytest.fixture(scope="module")
def packed(source: Make, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """packed(kind): the same in f16, packed as it was published."""
    root = tmp_path_factory.mktemp("packed")

    def folder(kind: str) -> Path:
        if not (root / kind).exists():
            pack_f16(str(source(kind)), root / kind, activation=ACTIVATION.get(kind))
        return root / kind

    return folder


def pack_f16(model: str, out: Path, **settings: Any) -> Path:
    pack(model, out, quant="f16", predictor_quant="f16", **settings)
    return out


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    return model(torch.tensor([PROMPT]), use_cache=False).logits[0]


def engine_logits(folder: Path, mode: str, backend: str = "cpu") -> torch.Tensor:
    engine = Engine(folder, backend=backend, mode=mode)  # type: ignore[arg-type]
    return torch.cat([torch.tensor(part) for part in engine.logits(PROMPT)])


def engine_greedy(engine: Engine, prompt: list[int]) -> list[int]:
    sequence = engine.sequence(prompt)
    for _ in range(TOKENS):
        sequence.extend([int(engine.step([sequence])[0].logits.argmax())])
    return sequence.tokens[len(prompt) :]


# --- what is computed -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_published_model_computes_its_published_formula(
    source: Make, ours: Make, packed: Make, kind: str
) -> None:
    """Without a mask: read as it is, converted, and packed on both backends."""
    truth = logits(formula(kind, tensors_of(source(kind))))
    activation = ACTIVATION.get(kind)
    for folder, asked in ((source(kind), activation), (ours(kind), None)):
        model = load_model(folder, activation=asked, dtype=torch.float32).eval()
        assert relative_rms(logits(model), truth) < 1e-5
    for backend in BACKENDS:
        for mode in ("dense", "exact"):
            assert relative_rms(engine_logits(packed(kind), mode, backend), truth) < SAME


@pytest.mark.parametrize("kind", READS)
def test_the_merged_predictor_masks_as_the_published_file_does(
    source: Make, packed: Make, kind: str
) -> None:
    """A logit of exactly 0 is out there: the published file rounds a half to even."""
    tensors = tensors_of(source(kind))
    truth = logits(formula(kind, tensors, rounded))
    for backend in BACKENDS:
        assert relative_rms(engine_logits(packed(kind), "predicted", backend), truth) < SAME
    others = {
        "no mask": formula(kind, tensors),
        "ties are in": formula(kind, tensors, lambda x: (x >= 0).float()),
        "wrong input": formula(
            kind,
            tensors,
            rounded,
            reads={"pre_norm": "post_norm", "post_norm": "pre_norm"}[READS[kind]],
        ),
    }
    for name, other in others.items():
        assert relative_rms(logits(other), truth) > OTHER, f"{name} must show"


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_road_generates_the_same_tokens(
    source: Make, ours: Make, tmp_path: Path, kind: str
) -> None:
    """The published formula, our class, and what is packed from ours on both backends."""
    tensors = tensors_of(source(kind))
    folder = pack_f16(str(ours(kind)), tmp_path / "packed")
    prompt, truth = greedy(
        of_transformers(formula(kind, tensors)),
        PROMPTS, TOKENS, partial(engine_greedy, Engine(folder)),
    )  # fmt: skip
    assert len(set(truth)) > 5, "a text that repeats one token would prove little"
    model = load_model(ours(kind), dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    ids = torch.tensor([prompt])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS)
    assert made[0, len(prompt) :].tolist() == truth
    for backend in BACKENDS:
        assert engine_greedy(Engine(folder, backend=backend), prompt) == truth
    if kind in READS:
        guess = partial(engine_greedy, Engine(folder, mode="predicted"))
        logits = of_transformers(formula(kind, tensors, rounded))
        prompt, truth = greedy(logits, PROMPTS, TOKENS, guess)
        for backend in BACKENDS:
            assert engine_greedy(Engine(folder, backend=backend, mode="predicted"), prompt) == truth


def test_experts_have_a_threshold_too(sparse: Callable[..., Path], tmp_path: Path) -> None:
    model = shutil.copytree(sparse("mixtral", "reglu"), tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"ffn_threshold": 0.5}))
    # rounding must not carry a gate over the threshold
    halves = {name: tensor.half() for name, tensor in tensors_of(model).items()}
    save_file(halves, model / "model.safetensors", {"format": "pt"})
    cut, plain = (
        load_model(folder, dtype=torch.float32).eval()
        for folder in (model, sparse("mixtral", "reglu"))
    )
    truth = logits(cut)
    assert relative_rms(logits(plain), truth) > OTHER
    cut.set_experts_implementation("eager")
    assert relative_rms(logits(cut), truth) < 1e-5
    packed = pack_f16(str(model), tmp_path / "packed")
    for backend in BACKENDS:
        assert relative_rms(engine_logits(packed, "exact", backend), truth) < SAME


def test_the_threshold_matters(source: Make, packed: Make) -> None:
    other = CONFIGS["prosparse"] | {"hidden_act_param": 0.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIGS, "prosparse", other)
        plain = logits(formula("prosparse", tensors_of(source("prosparse"))))
    assert relative_rms(engine_logits(packed("prosparse"), "exact"), plain) > OTHER


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_is_said_of_a_packed_model(
    ours: Make, packed: Make, tmp_path: Path, kind: str
) -> None:
    again = Packed(pack_f16(str(ours(kind)), tmp_path / "again"))
    direct = Packed(packed(kind))
    assert again.header.ffn == direct.header.ffn, "by way of our folder or directly"
    ffn = direct.header.ffn
    drelu = kind in ("bamboo", "turbosparsemixtral", "sparseqwen2")
    assert ffn.activation == ("drelu" if drelu else "reglu")
    assert ffn.threshold == (0.25 if kind in ("prosparse", "minicpm") else 0)
    if kind not in READS:
        assert ffn.predictor is None
        return
    assert ffn.predictor
    width = 4 if kind == "turbosparsemixtral" else 1
    assert ffn.predictor.ranks == [[rank] * width for rank in RANKS], "read from the tensors"
    assert ffn.predictor.input == READS[kind]
    assert 0 < ffn.predictor.threshold < 1e-37
    assert ffn.predictor.recall is None, "not measured, so `auto` does not mask"
    assert Engine(packed(kind)).mode == "exact"


def test_a_published_model_is_analysed(source: Make, corpus: Path, tmp_path: Path) -> None:
    found = analyse(str(source("bamboo")), data=[corpus], out=tmp_path, max_tokens=200)
    assert found.activation == "drelu"
    assert 0.5 < found.activation_sparsity < 1


# --- the traps of the chat model ------------------------------------------------------------------


def ending(token: int, model: Path, out: Path) -> Path:
    """A copy whose first greedy token after the chat prompt of `hello` is this one."""
    shutil.copytree(model, out)
    tensors = tensors_of(model)
    network = formula("bamboo", tensors)
    ids = Tokenizer(pack_f16(str(model), out / "probe")).chat(
        [{"role": "user", "content": "hello"}]
    )
    shutil.rmtree(out / "probe")
    with torch.inference_mode():
        last = network.model(torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1]
    path = out / "model-00002-of-00002.safetensors"
    shard = {name: tensors[name].bfloat16() for name in names_in(path)}
    shard["lm_head.weight"][token] = last.bfloat16()
    save_file(shard, path, {"format": "pt"})
    return out


def names_in(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return list(file.keys())


@pytest.mark.parametrize("token", [2, IM_END])
def test_a_chat_ends_at_both_end_tokens(source: Make, tmp_path: Path, token: int) -> None:
    """config.json names 2 only, generation_config.json none, and the chat ends with <|im_end|>."""
    model = ending(token, source("bamboo"), tmp_path / "model")
    folder = pack_f16(str(model), tmp_path / "packed")
    assert Tokenizer(folder).stop_ids() == {2, IM_END}
    done = generate(folder, prompt="hello", chat=True, max_tokens=5)
    assert (done.tokens, done.finish) == (1, "stop")
    convert(str(model), tmp_path / "ours")
    network = load_model(tmp_path / "ours", dtype=torch.float32).eval()
    ids = torch.tensor([Tokenizer(folder).chat([{"role": "user", "content": "hello"}])])
    made = network.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5)
    assert made[0, ids.shape[1] :].tolist() == [token], "greedy, and it ends there"


def test_training_settings_do_not_travel(ours: Make) -> None:
    """A sampling temperature of 0 is an error to transformers, and no cache is slow."""
    generation = json.loads((ours("bamboo") / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, IM_END]
    assert not {"do_sample", "temperature", "use_cache"} & generation.keys()
    config = json.loads((ours("bamboo") / "config.json").read_text())
    assert config["eos_token_id"] == [2, IM_END]
    assert "use_cache" not in config
    assert load_config(ours("bamboo")).use_cache


def test_what_training_saves_can_generate(source: Make, tmp_path: Path) -> None:
    model = load_model(source("bamboo"), dtype=torch.float32)
    save_model(model, load_tokenizer(source("bamboo")), tmp_path)
    again = load_model(tmp_path).eval()
    made = again.generate(torch.tensor([PROMPT]), max_new_tokens=3, pad_token_id=0)
    assert made.shape[1] > len(PROMPT)
    assert "use_cache" not in json.loads((tmp_path / "config.json").read_text())


def test_the_template_opens_the_answer_once(packed: Make) -> None:
    """It opens one after every user's turn, asked or not."""
    tokenizer = Tokenizer(packed("bamboo"))
    turns = [("user", "hi"), ("assistant", "yes"), ("user", "go")]
    ids = tokenizer.chat([{"role": role, "content": text} for role, text in turns])
    user = [tokenizer.vocabulary[token] for token in ("<|im_start|>", "<|im_end|>")]
    assert ids.count(user[0]) == 4
    assert ids.count(user[1]) == 3
    assert ids[-1] != user[1]


@pytest.mark.parametrize("kind", ["bamboo", "turbosparsemixtral", "prosparse"])
def test_no_code_of_the_folder_runs(source: Make, ours: Make, kind: str) -> None:
    assert list(source(kind).glob("modeling_*.py")), "whoever imports it exits"
    load_tokenizer(source(kind))
    files = {path.name for path in ours(kind).glob("*.py")}
    assert files == {"ffn_activation.py", "modeling_drelu.py", "modeling_drelu_moe.py"}
    remote = json.loads((ours(kind) / "config.json").read_text())["auto_map"]
    assert all(target.startswith("modeling_drelu") for target in remote.values())


@pytest.mark.parametrize("kind", READS)
def test_what_we_export_has_the_published_layout(
    source: Make, ours: Make, tmp_path: Path, kind: str
) -> None:
    export(str(ours(kind)), tmp_path / "out", to="turbosparse")
    before, after = tensors_of(source(kind)), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for key in ("model_type", "architectures", "hidden_act", "rope_theta", "sliding_window"):
        assert config[key] == CONFIGS[kind][key], key
    again = Packed(pack_f16(str(tmp_path / "out"), tmp_path / "again"))
    direct = Packed(pack_f16(str(source(kind)), tmp_path / "direct"))
    assert again.header.ffn == direct.header.ffn


# --- what is not said, or not supported -----------------------------------------------------------


@pytest.mark.parametrize("kind", ACTIVATION)
def test_a_stock_config_with_relu_must_be_told_its_activation(
    source: Make, corpus: Path, tmp_path: Path, kind: str
) -> None:
    """Stock classes would run both as ReGLU, one of them wrongly."""
    model, message = str(source(kind)), r"--activation reglu .* or --activation drelu"
    with pytest.raises(TurboSparseError, match=message):
        pack(model, tmp_path / "out")
    with pytest.raises(TurboSparseError, match=message):
        convert(model, tmp_path / "out")
    with pytest.raises(TurboSparseError, match=message):
        analyse(model, data=[corpus], out=tmp_path)
    with pytest.raises(TurboSparseError, match=message):
        load_model(model)
    with pytest.raises(TurboSparseError, match="--activation swiglu would make another function"):
        convert(model, tmp_path / "out", activation="swiglu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("place", "card", "known"),
    [
        ("SparseQwen2-7B", "", True),
        ("sparseqwen2-7b.Q4_0-0123456789ab", "", True),
        ("models--Tiiny--SparseQwen2-7B/snapshots/9260b43", "", True),
        ("here", "---\nlicense: apache-2.0\n---\n\n# SparseQwen2-7B\n", True),
        ("here", "# Another\n\nBetter than SparseQwen2-7B\n", False),
        ("SparseQwen2-7B-control", "", False),
        ("ReluLLaMA-7B", "", False),
    ],
)
@pytest.mark.parametrize("says", ["relu", "silu"])
def test_a_model_that_only_its_name_tells(
    source: Make, tmp_path: Path, place: str, card: str, known: bool, says: str
) -> None:
    model = shutil.copytree(source("sparseqwen2"), tmp_path / place)
    raw = CONFIGS["sparseqwen2"] | {"hidden_act": says}
    (model / "config.json").write_text(json.dumps(raw))
    (model / "README.md").write_text(card)
    if known:
        assert load_config(model).ffn_activation == "drelu"
        assert read_model_config(model).ffn_activation == "drelu"
    elif says == "relu":
        with pytest.raises(TurboSparseError, match="--activation"):
            load_config(model)
    else:
        assert load_config(model).model_type == "qwen2"


@pytest.mark.parametrize(
    ("kind", "name"), [("sparseqwen2", "SparseQwen2-7B"), ("relullama", "ReluLLaMA-7B")]
)
def test_a_model_known_by_its_name_is_packed_and_converted(
    source: Make, packed: Make, tmp_path: Path, kind: str, name: str
) -> None:
    model = str(shutil.copytree(source(kind), tmp_path / name))
    assert pack(model, tmp_path / "packed", quant="f16").activation == ACTIVATION[kind]
    assert convert(model, tmp_path / "ours").activation == ACTIVATION[kind]
    named, told = engine_logits(tmp_path / "packed", "exact"), engine_logits(packed(kind), "exact")
    assert torch.equal(named, told)
    with pytest.raises(TurboSparseError, match="would make another function"):
        convert(model, tmp_path / "out", activation="geglu")


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("bamboo", {"hidden_act": "silu"}, "hidden_act is 'silu'; of a bamboo model only 'relu'"),
        ("sparselm", {"sparsity_gated_mlp": False}, "sparsity_gated_mlp is False"),
        ("sparselm", {"rope_interleaved": True}, "rope_interleaved is True"),
        (
            "prosparse",
            {"hidden_act_param": None},
            "threshold as hidden_act_param, not None",
        ),
        ("prosparse", {"hidden_act_param": -1.0}, "ffn_threshold is -1.0"),
        ("minicpm", {"model_type": "minicpm"}, "model_type 'minicpm' is not supported"),
        ("bamboo", {"vocab_size": 32000}, r"model.embed_tokens.weight is \[320, 64\]"),
    ],
)
def test_what_a_published_config_must_not_say(
    source: Make, tmp_path: Path, kind: str, change: dict[str, Any], message: str
) -> None:
    model = shutil.copytree(source(kind), tmp_path / "model")
    (model / "config.json").write_text(json.dumps(CONFIGS[kind] | change))
    for command in (pack, convert):
        with pytest.raises(TurboSparseError, match=message):
            command(str(model), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (
            "bamboo",
            {"activation": "reglu"},
            "but drelu: --activation reglu would make",
        ),
        ("bamboo", {"data": [Path(__file__)]}, "--data fits a dense one"),
        ("bamboo", {"predictor": "bamboo"}, "predictor.fc1.weight itself"),
    ],
)
def test_a_sparse_model_stays_what_it_is(
    source: Make, tmp_path: Path, kind: str, settings: dict[str, Any], message: str
) -> None:
    if "predictor" in settings:
        settings["predictor"] = str(apart(source(kind), tmp_path / "apart"))
    with pytest.raises(TurboSparseError, match=message):
        convert(str(source(kind)), tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


# --- predictors that are published apart ----------------------------------------------------------


def apart(model: Path, folder: Path, **settings: Any) -> Path:
    """The predictor of a model as PowerInfer's models have theirs."""
    folder.mkdir()
    tensors = tensors_of(model)
    for layer in range(LAYERS):
        fc1, fc2 = (tensors[name].half() for name in ffns("bamboo", layer)[0][3:])
        torch.save({"fc1.weight": fc1, "fc2.weight": fc2}, folder / f"model_{layer}.pt")
    if settings:
        (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def base(source: Make, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Bamboo-base: the model without predictor in one file, and the folder of its predictor."""
    root = tmp_path_factory.mktemp("bamboo")
    shutil.copytree(source("bamboo"), root / "base", ignore=shutil.ignore_patterns("model*"))
    tensors = {n: t.bfloat16() for n, t in tensors_of(source("bamboo")).items()}
    tensors = {name: tensor for name, tensor in tensors.items() if ".predictor." not in name}
    save_file(tensors, root / "base" / "model.safetensors", {"format": "pt"})
    return root / "base", apart(source("bamboo"), root / "apart", sparse_threshold=0.5)


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_a_predictor_apart_follows_the_rule_of_powerinfer(
    source: Make, base: tuple[Path, Path], tmp_path: Path, threshold: float
) -> None:
    """There a logit that equals the threshold is in; the threshold is 0 unless its config says."""
    model, _ = base
    settings = {"sparse_threshold": threshold} if threshold else {}
    folder = apart(source("bamboo"), tmp_path / "apart", **settings)
    truth = logits(
        formula("bamboo", tensors_of(source("bamboo")), lambda x: (x >= threshold).float())
    )
    direct = pack_f16(str(model), tmp_path / "direct", predictor=str(folder))
    convert(str(model), tmp_path / "ours", predictor=str(folder))
    converted = pack_f16(str(tmp_path / "ours"), tmp_path / "converted")
    for packed in (direct, converted):
        found = Packed(packed).header.ffn.predictor
        assert found
        assert (found.input, found.threshold) == ("pre_norm", threshold)
        for backend in BACKENDS:
            assert relative_rms(engine_logits(packed, "predicted", backend), truth) < SAME
    load_model(tmp_path / "ours")


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a layer missing": (lambda f: (f / "model_1.pt").unlink(), "model_1.pt is missing"),
    "a layer too many": (
        lambda f: shutil.copy(f / "model_1.pt", f / "model_2.pt"),
        "model_2.pt is not of this model",
    ),
    "no tensors": (lambda f: (f / "model_0.pt").write_text("?"), "cannot be read as torch tensors"),
    "a pickled object": (
        lambda f: torch.save({"fc1.weight": Path("x")}, f / "model_0.pt"),
        "cannot be read as torch tensors",
    ),
    "another form": (
        lambda f: torch.save({"0.weight": torch.ones(2, 2)}, f / "model_0.pt"),
        "holds 0.weight, not fc1.weight and fc2.weight",
    ),
    "whole numbers": (
        lambda f: torch.save(
            {"fc1.weight": torch.ones(32, 64).int(), "fc2.weight": torch.ones(96, 32)},
            f / "model_0.pt",
        ),
        "are not floating point matrices",
    ),
    "another shape": (
        lambda f: torch.save(
            {"fc1.weight": torch.ones(32, 64), "fc2.weight": torch.ones(90, 32)}, f / "model_0.pt"
        ),
        r"predictor.fc2.weight is \[90, 32\], config.json asks for \[96, 32\]",
    ),
    "a bad threshold": (
        lambda f: (f / "config.json").write_text('{"sparse_threshold": NaN}'),
        "sparse_threshold is nan, not a finite number",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_predictor_is_named_and_leaves_nothing(
    base: tuple[Path, Path], tmp_path: Path, fault: str
) -> None:
    model, good = base
    damage, message = FAULTS[fault]
    folder = shutil.copytree(good, tmp_path / "apart")
    damage(folder)
    for command in (pack, convert):
        with pytest.raises(TurboSparseError, match=message):
            command(str(model), tmp_path / "out", predictor=str(folder))
    assert [path.name for path in tmp_path.iterdir()] == ["apart"]


def test_a_predictor_belongs_to_a_sparse_dense_model(
    base: tuple[Path, Path], source: Make, dense: Make, tmp_path: Path
) -> None:
    predictor = str(base[1])
    with pytest.raises(TurboSparseError, match="--predictor is for a sparse one"):
        convert(str(dense("mistral")), tmp_path / "out", predictor=predictor)
    with pytest.raises(TurboSparseError, match="for dense models, not for experts"):
        pack(str(source("turbosparsemixtral")), tmp_path / "out", predictor=predictor)
    with pytest.raises(TurboSparseError, match="no such folder: sing; give a folder of predictors"):
        pack(str(base[0]), tmp_path / "out", predictor="sing")


def test_inspect_says_what_is_special(packed: Make) -> None:
    assert "threshold above 0" in str(inspect(packed("bamboo")).predictor)
    assert inspect(packed("prosparse")).threshold == 0.25


def test_models_and_predictors_come_from_the_hub(
    base: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the files that are read are asked for; those with code are not."""
    asked: list[str] = []

    def download(repository: str, *, allow_patterns: list[str], **_: Any) -> str:
        asked.extend(allow_patterns)
        return str(base[repository.endswith("-predictor")])

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    predictor = "PowerInfer/Bamboo-base-v0.1-predictor"
    done = pack("PowerInfer/Bamboo-base-v0_1", tmp_path / "out", quant="q8", predictor=predictor)
    assert done.predictor == "low_rank q8 predictor, threshold 0.5"
    assert "model_*.pt" in asked
    assert not [pattern for pattern in asked if pattern.endswith((".py", ".bin", "*"))]
