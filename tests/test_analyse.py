"""What `analyse` measures, against the same figures worked out by hand."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONTEXT, EVERY
from safetensors.torch import save_file

from turbosparse.analyse import analyse
from turbosparse.analysis.measure import measure
from turbosparse.base.errors import TurboSparseError
from turbosparse.hf import families
from turbosparse.hf.activations import ACTIVATIONS, WITHOUT_ZEROS
from turbosparse.hf.checkpoint import Checkpoint
from turbosparse.hf.layerwise import Layerwise
from turbosparse.hf.load import load_model, load_tokenizer
from turbosparse.pack import pack
from turbosparse.packed.stats import Stats
from turbosparse.training.meter import Meter
from turbosparse.training.readers import documents

Make = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="session")
def texts(corpus: Path) -> list[str]:
    """Documents of 1 to 5 sentences; the longest do not fit the context."""
    return list(documents(corpus))[:7]


@pytest.fixture(scope="session")
def short(texts: list[str]) -> list[str]:
    """Those that do."""
    return [text for text in texts if text.count(".") < 4]


def double(folder: Path) -> Any:
    """The model in float64, where no rounding moves a pre-activation across zero."""
    model = load_model(folder, dtype=torch.float64).eval()
    if families.experts(model.config):
        model.set_experts_implementation("eager")  # the fused ones know no float64
    return model


def token_ids(folder: Path, texts: list[str]) -> list[list[int]]:
    tokenizer = load_tokenizer(folder)
    return [tokenizer(text)["input_ids"] for text in texts]


@torch.no_grad()
def nats_by_hand(model: Any, ids: list[int]) -> float:
    """What a model that reads `ids` in one piece pays for all but the first."""
    logits = model(torch.tensor([ids])).logits[0, :-1].double()
    return -float(logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]].sum())


@pytest.mark.parametrize("family", ["qwen2", "mixtral"])
def test_nats_per_token_are_those_of_one_forward_per_document(
    sparse: Make, short: list[str], family: str
) -> None:
    folder = sparse(family)
    model, ids = double(folder), token_ids(folder, short)
    assert max(map(len, ids)) <= CONTEXT
    stats = measure(model, load_tokenizer(folder), {"boats": short})
    expected = sum(nats_by_hand(model, document) for document in ids)
    count = sum(len(document) - 1 for document in ids)
    assert stats.predicted == {"boats": count}
    assert stats.nats_per_token("boats") == pytest.approx(expected / count, rel=1e-6)
    assert stats.perplexity("boats") == pytest.approx(math.exp(expected / count), rel=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "mixtral"])
def test_squares_are_those_of_what_the_matrices_read(
    sparse: Make, short: list[str], family: str
) -> None:
    model, ids = double(sparse(family)), token_ids(sparse(family), short)
    stats = measure(model, load_tokenizer(sparse(family)), {"boats": short})
    layer = model.model.layers[1]
    outputs = {"qkv": layer.input_layernorm, "ffn": layer.post_attention_layernorm}
    outputs["head"] = model.model.norm
    sums = dict.fromkeys(stats.squares, torch.tensor(0.0))

    def add(kind: str, x: torch.Tensor) -> None:
        sums[kind] = sums[kind] + x.detach().flatten(0, -2).square().sum(0)

    for kind, module in outputs.items():
        module.register_forward_hook(lambda *given, kind=kind: add(kind, given[2]))
    layer.self_attn.o_proj.register_forward_pre_hook(lambda _, given: add("o", given[0]))
    for document in ids:
        model(torch.tensor([document[:-1]]))
    for kind, expected in sums.items():
        torch.testing.assert_close(stats.squares[kind][-1].double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("truncate", [False, True])
@pytest.mark.parametrize("window", [3, 10, 47])
def test_each_token_of_a_long_document_is_predicted_once(
    sparse: Make, texts: list[str], window: int, truncate: bool
) -> None:
    folder = sparse("llama")
    model, ids = double(folder), token_ids(folder, texts)
    expected, count = 0.0, 0
    for document in ids:
        position = 1  # of the next token to predict
        while position < len(document) and not (truncate and position > 1):
            piece = document[position - 1 : position + window]
            expected += nats_by_hand(model, piece)
            count += len(piece) - 1
            position += window
    if not truncate:
        assert count == sum(len(document) - 1 for document in ids)
    stats = measure(
        model, load_tokenizer(folder), {"boats": texts}, window=window, truncate=truncate
    )
    assert stats.predicted["boats"] == count
    assert stats.nats["boats"] == pytest.approx(expected, rel=1e-6)


def test_max_tokens_stops_each_corpus(sparse: Make, texts: list[str]) -> None:
    folder = sparse("llama")
    corpora = {"one": texts, "two": texts[::-1]}
    stats = measure(load_model(folder), load_tokenizer(folder), corpora, window=8, max_tokens=50)
    assert all(50 <= count < 50 + 8 for count in stats.predicted.values())


def test_padding_counts_for_nothing(sparse: Make, texts: list[str]) -> None:
    """Documents of other lengths in the batch leave no trace."""
    folder = sparse("mixtral")
    model, tokenizer = double(folder), load_tokenizer(folder)
    together = measure(model, tokenizer, {"boats": texts})
    singles = [measure(model, tokenizer, {"boats": [text]}) for text in texts]
    for counts in ("active", "gate_positive", "tokens"):
        assert torch.equal(getattr(together, counts), sum(getattr(one, counts) for one in singles))
    assert together.nats["boats"] == pytest.approx(sum(one.nats["boats"] for one in singles))


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("family", ["mistral", "mixtral"])
def test_counts_are_those_of_the_written_out_feed_forward(
    sparse: Make, short: list[str], family: str, activation: str
) -> None:
    """Each FFN computed anew from its input and the tensors on disk, token by token and expert."""
    folder = sparse(family, activation)
    model, tensors = double(folder), Checkpoint(folder)
    inputs: list[torch.Tensor] = []
    for block in model.model.layers:
        block.mlp.register_forward_pre_hook(lambda _module, args: inputs.append(args[0][0]))
    expected = Stats.empty(model.config)
    layers, experts, _ = expected.active.shape
    for ids in token_ids(folder, short):
        inputs.clear()
        with torch.no_grad():
            model(torch.tensor([ids[:-1]]))  # the last token predicts nothing
        for layer in range(layers):
            x = inputs[layer]
            chosen = torch.zeros(len(x), 1, dtype=torch.int64)
            if family == "mixtral":
                router = tensors[families.table(model.config).name("router", layer)].double()
                chosen = (x @ router.T).topk(2).indices
            for expert in range(experts):
                mine = x[(chosen == expert).any(-1)]
                names = families.ffn(model.config, layer, expert if family == "mixtral" else None)
                gate, up = (mine @ tensors[names[role]].double().T for role in ("gate", "up"))
                if "gate" not in ACTIVATIONS[activation].parts:
                    gate = up  # its own
                fires = {
                    "drelu": (gate > 0) & (up > 0),
                    "geglu": gate != 0,
                    "reglu": gate > 0,
                    "relu": up > 0,
                    "relu2": up > 0,
                    "swiglu": gate != 0,
                }[activation]
                expected.active[layer, expert] += fires.sum(0)
                expected.gate_positive[layer, expert] += (gate > 0).sum(0)
                expected.tokens[layer, expert] += len(mine)

    stats = measure(model, load_tokenizer(folder), {"boats": short})
    assert torch.equal(stats.tokens, expected.tokens)
    assert torch.equal(stats.active, expected.active)
    assert torch.equal(stats.gate_positive, expected.gate_positive)
    top = 2 if family == "mixtral" else 1
    assert stats.tokens.sum(-1).tolist() == [top * stats.predicted["boats"]] * layers
    if activation in WITHOUT_ZEROS:
        assert stats.activation_sparsity() == 0
    else:
        assert 0.3 < stats.activation_sparsity() < 0.9


@pytest.mark.parametrize("family", EVERY)
def test_training_logs_the_sparsity_that_the_analysis_finds(
    sparse: Make, short: list[str], family: str
) -> None:
    folder = sparse(family)
    model = double(folder)
    stats = measure(model, load_tokenizer(folder), {"boats": short[2:3]})
    (ids,) = token_ids(folder, short[2:3])
    meter = Meter(model)
    with meter.watch(), torch.no_grad():
        model(torch.tensor([ids[:-1]]))
    read = meter.read(lambda counts: counts)
    layers = [read["sparsity/layer_00"], read["sparsity/layer_01"]]
    assert layers == pytest.approx((1 - stats.per_layer(stats.active_ratio())).tolist(), abs=1e-12)
    assert read["activation_sparsity"] == pytest.approx(stats.activation_sparsity(), abs=1e-12)


def test_corpora_are_measured_side_by_side(sparse: Make, texts: list[str]) -> None:
    folder = sparse("mistral")
    model, tokenizer = double(folder), load_tokenizer(folder)
    corpora = {"boats": texts, "other": ["Quite another text, of a rarer kind?"]}
    both = measure(model, tokenizer, corpora)
    alone = {name: measure(model, tokenizer, {name: own}) for name, own in corpora.items()}
    assert torch.equal(both.active, alone["boats"].active + alone["other"].active)
    for name in corpora:
        assert both.nats_per_token(name) == pytest.approx(alone[name].nats_per_token())
    mean = sum(both.nats.values()) / sum(both.predicted.values())
    assert both.nats_per_token() == pytest.approx(mean)


def test_a_corpus_without_a_token_to_predict_is_refused(sparse: Make) -> None:
    folder = sparse("mistral")
    with pytest.raises(TurboSparseError, match="'empty' holds no document of two tokens or more"):
        measure(load_model(folder), load_tokenizer(folder), {"empty": [""]})


def counted(active: list[list[list[int]]], tokens: list[list[int]]) -> Stats:
    counts = torch.tensor(active)
    return Stats(counts, counts.clone(), torch.tensor(tokens))


def test_experts_count_by_the_tokens_they_saw_and_layers_alike() -> None:
    """Two neurons; the expert that no token reached does not count."""
    stats = counted([[[1, 0], [6, 6]], [[4, 4], [0, 0]]], [[1, 9], [10, 0]])
    assert stats.active_ratio().tolist() == [[0.5, 12 / 18], [0.4, 0.0]]
    used = [(0.5 * 1 + 12 / 18 * 9) / 10, 0.4]
    assert stats.per_layer(stats.active_ratio()).tolist() == pytest.approx(used)
    assert stats.activation_sparsity() == pytest.approx(1 - sum(used) / 2)


def test_statistics_are_read_back_as_they_were(tmp_path: Path) -> None:
    stats = counted([[[1, 2]]], [[3]])
    stats.nats, stats.predicted, stats.about = {"é": 1.25}, {"é": 3}, {"activation": "drelu"}
    stats.corpora = {"é": torch.tensor([[[3]], [[3]]])}
    path = tmp_path / "new" / "stats.turbosparse"
    stats.save(path)
    again = Stats.load(path)
    for counts in ("active", "gate_positive", "tokens"):
        assert torch.equal(getattr(again, counts), getattr(stats, counts))
    assert (again.nats, again.predicted, again.about) == (stats.nats, stats.predicted, stats.about)
    assert [child.name for child in path.parent.iterdir()] == ["stats.turbosparse"]


@pytest.mark.parametrize(
    "damage", ["missing", "folder", "cut short", "text", "a model", "other metadata", "no JSON"]
)
def test_a_file_that_is_no_statistics_is_refused(sparse: Make, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "stats.turbosparse"
    counted([[[1, 2]]], [[3]]).save(path)
    if damage == "cut short":
        path.write_bytes(path.read_bytes()[:-5])
    elif damage == "text":
        path.write_text("not at all")
    elif damage == "a model":
        shutil.copyfile(sparse("llama") / "model.safetensors", path)
    elif damage == "other metadata":
        save_file({"active": torch.zeros(1)}, path, metadata={"turbosparse": "{}"})
    elif damage == "no JSON":
        save_file({"active": torch.zeros(1)}, path, metadata={"turbosparse": "{"})
    else:
        path.unlink()
        if damage == "folder":
            path.mkdir()
    with pytest.raises(
        TurboSparseError,
        match=r"turbosparse is not a statistics file .*`turbosparse analyse`",
    ):
        Stats.load(path)


def test_statistics_of_another_model_are_refused(sparse: Make) -> None:
    config = load_model(sparse("mixtral")).config
    Stats.empty(config).check(config)
    with pytest.raises(
        TurboSparseError,
        match=r"active is \[1, 1, 2\] .* needs \[2, 4, 96\] torch\.int64; run `turbosparse",
    ):
        counted([[[1, 2]]], [[3]]).check(config)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_command_writes_statistics_into_the_model_folder(
    sparse: Make, corpus: Path, tmp_path: Path, family: str
) -> None:
    folder = shutil.copytree(sparse(family), tmp_path / "model")
    found = analyse(str(folder), data=[corpus], last=3, max_tokens=200)
    stats = Stats.load(folder / "stats.turbosparse")
    assert found.out == str(folder / "stats.turbosparse")
    assert stats.about == {"model": str(folder), "activation": "drelu"}
    assert found.tokens == stats.predicted[str(corpus)]
    assert found.perplexity == {str(corpus): stats.perplexity()}
    assert found.activation_sparsity == stats.activation_sparsity()
    for layer, shares in enumerate(found.expert_share):
        assert sum(shares) == pytest.approx(1)
        for expert, dead in enumerate(found.dead_neurons[layer]):
            assert dead == int((stats.active[layer, expert] == 0).sum())


def test_a_model_of_the_hub_needs_a_place_for_its_statistics(
    sparse: Make, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sparse("llama")
    before = sorted(folder.iterdir())
    monkeypatch.setattr("turbosparse.analyse.model_folder", lambda _: folder)
    with pytest.raises(TurboSparseError, match="org/model is not a local folder: say with --out"):
        analyse("org/model", data=[corpus])
    analyse("org/model", data=[corpus], out=tmp_path / "stats", last=1)
    assert (tmp_path / "stats" / "stats.turbosparse").is_file()
    assert sorted(folder.iterdir()) == before, "nothing is written into the hub's cache"


@pytest.mark.parametrize("family", EVERY)
def test_layer_by_layer_finds_the_same(sparse: Make, texts: list[str], family: str) -> None:
    folder = sparse(family)
    tokenizer = load_tokenizer(folder)
    whole = measure(load_model(folder, dtype=torch.float32), tokenizer, {"boats": texts})
    model = Layerwise(folder, device="cpu", dtype=torch.float32)
    parts = measure(model, tokenizer, {"boats": texts})
    assert parts.nats_per_token() == pytest.approx(whole.nats_per_token(), rel=1e-5)
    assert parts.predicted == whole.predicted
    assert torch.equal(parts.tokens, whole.tokens)
    for kind, squares in whole.squares.items():
        torch.testing.assert_close(parts.squares[kind], squares, rtol=1e-4, atol=1e-6)
    counts = [(whole.active, parts.active)]
    counts += [(whole.sums[n], parts.sums[n]) for n in ("signs", "unions", "batches", "entropy")]
    for one, other in counts:
        different = (other - one).abs().sum() / one.sum().clamp(min=1)
        assert different < 1e-3  # a neuron may fire or not by the order of a sum
    torch.testing.assert_close(parts.sample, whole.sample, rtol=0, atol=0.03)


def test_a_model_that_does_not_fit_runs_layer_by_layer(
    sparse: Make, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    whole = analyse(str(sparse("llama")), data=[corpus], out=tmp_path, max_tokens=300)
    monkeypatch.setattr("turbosparse.analyse.memory_available", lambda: 100_000)
    parts = analyse(str(sparse("llama")), data=[corpus], out=tmp_path, max_tokens=300)
    assert "running layer by layer" in capsys.readouterr().err
    assert parts.perplexity[str(corpus)] == pytest.approx(whole.perplexity[str(corpus)], rel=1e-4)


def test_each_corpus_has_its_own_sparsity(sparse: Make, texts: list[str]) -> None:
    model, tokenizer = double(sparse("mistral")), load_tokenizer(sparse("mistral"))
    corpora = {"boats": texts, "other": ["Quite another text, of a rarer kind?"]}
    both = measure(model, tokenizer, corpora)
    for name, own in corpora.items():
        alone = measure(model, tokenizer, {name: own}).activation_sparsity()
        assert both.sparsity[name] == pytest.approx(alone)


def test_a_dense_model_shows_how_much_is_nearly_zero(dense: Make, texts: list[str]) -> None:
    model, tokenizer = load_model(dense("llama")), load_tokenizer(dense("llama"))
    near = measure(model, tokenizer, {"boats": texts}).near_zero
    assert list(near) == ["0.01", "0.03", "0.1"]
    assert 0 < near["0.01"] < near["0.03"] < near["0.1"] < 1


def test_hot_neurons_are_the_fewest_that_make_most_activations() -> None:
    stats = counted([[[70, 5, 5, 20]], [[1, 1, 1, 1]]], [[100], [4]])
    assert stats.hot_share(0.8) == [[0.5], [1.0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"last": -3}, "--last is -3; give at least 1"),
        ({"max_tokens": 0}, "--max-tokens is 0; give at least 1"),
        ({"max_tokens": -1}, "--max-tokens is -1"),
        ({"window": 0}, "--window is 0"),
        ({"data": []}, "give --data"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(
    sparse: Make, corpus: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(TurboSparseError, match=message):
        analyse(str(sparse("llama")), **{"data": [corpus], **options})


def test_a_place_that_cannot_be_written_is_refused_before_measuring(
    sparse: Make, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr("turbosparse.analyse.measure", None)
    with pytest.raises(TurboSparseError, match="choose another folder with --out"):
        analyse(str(sparse("llama")), data=[corpus], out=tmp_path / "file")


def test_figures_are_shown_where_the_disk_fills_up_meanwhile(
    sparse: Make, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Stats, "save", full)
    found = analyse(str(sparse("llama")), data=[corpus], out=tmp_path, max_tokens=100)
    assert found.tokens >= 100
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_are_an_error_and_not_a_figure(
    sparse: Make, texts: list[str]
) -> None:
    model = load_model(sparse("llama"))
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(TurboSparseError, match="the loss on boats is nan: the model has weights"):
        measure(model, load_tokenizer(sparse("llama")), {"boats": texts})
    assert (
        Stats(*[torch.zeros(1, 1, 1)] * 2, torch.zeros(1, 1), {"a": 1e6}, {"a": 1}).perplexity()
        == math.inf
    )


def test_a_token_beyond_the_embedding_is_named(sparse: Make) -> None:
    model, tokenizer = load_model(sparse("llama")), load_tokenizer(sparse("llama"))
    tokenizer.add_tokens(["[PAD]"])
    with pytest.raises(TurboSparseError, match=r"holds the token '\[PAD\]' with id 320"):
        measure(model, tokenizer, {"boats": ["boats [PAD] boats"]})


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_packed_folder_is_measured_by_the_engine(
    sparse: Make, corpus: Path, tmp_path: Path, family: str
) -> None:
    folder = sparse(family)
    whole = analyse(str(folder), data=[corpus], out=tmp_path, max_tokens=400, dtype="float32")
    found = {}
    for quant in ("f16", "q4"):
        pack(str(folder), tmp_path / quant, quant=quant)
        found[quant] = analyse(str(tmp_path / quant), data=[corpus], max_tokens=400)
    name = str(corpus)
    assert found["f16"].tokens == whole.tokens
    assert found["f16"].nats_per_token[name] == pytest.approx(whole.nats_per_token[name], rel=1e-3)
    assert found["f16"].activation_sparsity == pytest.approx(whole.activation_sparsity, abs=2e-3)
    assert abs(found["q4"].nats_per_token[name] - whole.nats_per_token[name]) > 1e-3


def test_a_corpus_is_read_only_as_far_as_it_is_measured(sparse: Make, tmp_path: Path) -> None:
    """The broken row behind it is never reached."""
    rows = [json.dumps({"text": "The boats went home. " * 20})] * 40 + ["not JSON"]
    (tmp_path / "long.jsonl").write_text("\n".join(rows))
    data = [tmp_path / "long.jsonl"]
    assert analyse(str(sparse("llama")), data=data, out=tmp_path, max_tokens=150).tokens >= 150
    with pytest.raises(TurboSparseError, match=r"long\.jsonl:41 is not valid JSON"):
        analyse(str(sparse("llama")), data=data, out=tmp_path)
