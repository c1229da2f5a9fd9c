"""Predictors: made, applied in transformers as in the engine, measured, and kept within a bound."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Shared, drelu_recipe, make_model, merge_predictor
from safetensors.torch import load_file, save_file
from torch import Tensor

from turbosparse.base.errors import TurboSparseError
from turbosparse.base.folders import read_config
from turbosparse.convert import convert
from turbosparse.engine.engine import Engine
from turbosparse.export import export
from turbosparse.hf.checkpoint import Checkpoint
from turbosparse.hf.load import load_model
from turbosparse.hf.published import own_fields
from turbosparse.pack import pack
from turbosparse.predictor import train
from turbosparse.predictors.mask import predicted
from turbosparse.predictors.measure import Seen
from turbosparse.predictors.rows import carrying
from turbosparse.score import Scored, read_scores, score
from turbosparse.train import train as train_model

Make = Callable[..., Path]
FAMILIES = ("llama", "mixtral", "nemotron")  # with a gate, with experts, without a gate
KINDS = ("lowrank", "svd", "sign")
PROMPT = [0, 40, 200, 7, 99, 31, 300, 12, 64, 65, 5, 170]
# relative error of a token's logits: the engine keeps keys and values in half precision. It is
# asked of most tokens, for a score that lies at the threshold may fall on its other side
LOGITS = 1e-2
SMALL: dict[str, Any] = {"tokens": 4096, "share": 0.8, "epochs": 2}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="session")
def text(shared: Shared) -> Path:
    """5,000 tokens of documents that are all different."""

    def write(path: Path) -> None:
        random = torch.Generator().manual_seed(3)
        words = ["boats", "and", "gulls", "went", "home", "under", "rain", "with", "no", "captain"]
        rows = [torch.randint(len(words), (60,), generator=random).tolist() for _ in range(120)]
        texts = [" ".join(words[number] for number in row) for row in rows]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    return shared("predictor-text.jsonl", write)


@pytest.fixture(scope="session")
def made(sparse: Make, shared: Shared, text: Path) -> Make:
    """made(family, kind, **settings): a toy model with predictors; do not write into it."""

    def folder(family: str, kind: str = "svd", **settings: Any) -> Path:
        name = f"predictor-{family}-{kind}-{'-'.join(map(str, settings.values()))}"
        settings = SMALL | settings
        return shared(name, partial(train, str(sparse(family)), data=[text], kind=kind, **settings))

    return folder


def logits_of(engine: Engine) -> tuple[Tensor, float]:
    cache = engine.decoder.new_cache(64)
    logits, counts = engine.decoder.step([PROMPT], [cache], mode=engine.mode, every=True)
    return torch.tensor(logits), float(counts[:, :, 0].mean())


def differ(some: Tensor, truth: Tensor) -> Tensor:
    return (some - truth).norm(dim=1) / truth.norm(dim=1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["svd", "sign"])
def test_transformers_with_the_mask_is_the_engine_in_predicted_mode(
    made: Make, tmp_path: Path, family: str, kind: str
) -> None:
    folder = made(family, kind, recall=0.9)
    model = load_model(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        plain = model(torch.tensor([PROMPT])).logits[0]
        with predicted(model, folder):
            masked = model(torch.tensor([PROMPT])).logits[0]
        assert torch.equal(model(torch.tensor([PROMPT])).logits[0], plain), "the mask is gone"
    pack(str(folder), tmp_path / "packed", quant="f16", predictor_quant="f16")
    for backend in ("torch", "cpu"):
        engine = Engine(tmp_path / "packed", backend=backend, mode="predicted")
        logits, candidates = logits_of(engine)
        assert float(differ(logits, masked).median()) < LOGITS, backend
        assert float(differ(plain, masked).median()) > 3 * LOGITS
        assert 0 < candidates < 96 * (2 if family == "mixtral" else 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_predictors_need_fewer_candidates_than_signs(made: Make, family: str) -> None:
    blocks = {kind: read_config(made(family, kind))["predictor"] for kind in KINDS}
    assert all(block["norm_recall"] > 0.98 for block in blocks.values())
    assert blocks["lowrank"]["density"] < 0.8 * blocks["sign"]["density"]
    assert blocks["svd"]["density"] < 0.8 * blocks["sign"]["density"]
    threshold = blocks["lowrank"]["threshold"]
    assert [len(layer) for layer in threshold] == [4 if family == "mixtral" else 1] * 2
    assert threshold[0][0] != threshold[1][0]


def test_training_lowers_the_density_of_what_it_starts_from(made: Make) -> None:
    long = {"epochs": 12, "share": 0.3}
    trained, start = (
        read_config(made("llama", kind, **long))["predictor"] for kind in ("lowrank", "svd")
    )
    assert trained["density"] < start["density"]
    assert trained["norm_recall"] > 0.98


def test_a_threshold_keeps_the_share_of_the_output_and_no_more() -> None:
    random = torch.Generator().manual_seed(0)
    shares = torch.rand(50, 20, generator=random) * (torch.rand(50, 20, generator=random) < 0.3)
    shares /= shares.sum(-1, keepdim=True).clamp(min=1e-9)
    scores = shares + 0.1 * torch.randn(50, 20, generator=random)
    seen = Seen(scores, shares > 0, shares, 0.0)
    least = seen.threshold(0.9)
    kept = float(shares[scores >= least].sum() / shares.sum())
    above = float(shares[scores > least].sum() / shares.sum())
    assert above < 0.9 <= kept
    recall = seen.recall(least)
    assert recall.candidates == int((scores >= least).sum())
    assert recall.found == int((shares[scores >= least] > 0).sum())
    assert recall.norm == pytest.approx(kept * 50, rel=1e-5)
    idle = torch.cat([shares, torch.zeros(5, 20)])
    both = Seen(torch.cat([scores, scores[:5]]), idle > 0, idle, 0.0).recall(least)
    same = "a token without an active neuron has nothing to be found"
    assert both.shares(20)["norm_recall"] == recall.shares(20)["norm_recall"], same
    silent = Seen(scores, shares > 0, torch.zeros(50, 20), 0.0)
    assert silent.recall(silent.threshold(0.9)).candidates == 1000, "nothing is known: keep all"


def test_the_fewest_neurons_that_carry_a_share_are_the_largest() -> None:
    shares = torch.tensor([[0.1, 0.6, 0.0, 0.3], [0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 0.0, 0.0]])
    assert carrying(shares, 0.85).tolist() == [
        [False, True, False, True],
        [True, True, True, True],
        [False, False, False, False],
    ]
    assert carrying(shares, 1).tolist() == (shares > 0).tolist()


# --- made again -----------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from turbosparse.predictors import make
real, calls = make._make, 0
def stop_at_the_second(*given):
    global calls
    calls += 1
    if calls == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*given)
make._make = stop_at_the_second
from turbosparse.cli import main
main()
"""


def test_a_killed_run_resumes_and_the_same_seed_gives_the_same(
    made: Make, sparse: Make, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["predictor", "train", sparse("llama"), out, "--data", text]
    words += [word for key, value in SMALL.items() for word in (f"--{key}", value)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    code = [sys.executable, "-c", KILLED, *map(str, words)]
    assert subprocess.run(code, env=environment, check=False).returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["out.predicting"]
    again = partial(train, str(sparse("llama")), out, data=[text])
    with pytest.raises(TurboSparseError, match=r"with other settings \(seed\)"):
        again(**SMALL, seed=1)
    again(**SMALL)
    assert "resuming after layer 0" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    whole = made("llama", "lowrank")
    for name in ("predictor.safetensors", "config.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("kind", ["svd", "sign"])
def test_another_predictor_takes_the_place_of_one(
    made: Make, sparse: Make, text: Path, tmp_path: Path, kind: str
) -> None:
    merged = merge_predictor(sparse("llama"), tmp_path / "merged", threshold=0.0)
    for number, source in enumerate((made("llama"), merged)):
        out = tmp_path / str(number)
        train(str(source), out, data=[text], kind=kind, replace=True, **SMALL)  # type: ignore[arg-type]
        assert read_config(out) == read_config(made("llama", kind))
        one, other = ({**Checkpoint(folder)} for folder in (out, made("llama", kind)))
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


# --- measured -------------------------------------------------------------------------------------


def scored(folder: Path, text: Path, **settings: Any) -> Scored:
    return score(
        [str(folder)], data=[text], tokens=2048, targets=(0.5, 0.9, 0.999), **settings
    ).models[0]


def copied(folder: Path, copy: Path) -> Path:
    """A copy of a model folder that a test may write into."""
    return shutil.copytree(folder, copy)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_score_is_what_the_whole_model_says(
    made: Make, text: Path, tmp_path: Path, family: str
) -> None:
    folder = copied(made(family), tmp_path / "model")
    found = scored(folder, text, bound=0)
    recalls = [point.norm_recall for point in found.points]
    assert recalls[1] < recalls[2] < recalls[0] < recalls[3]
    assert found.points[3].kl < found.points[2].kl < found.points[1].kl
    densities = [point.density for point in found.points]
    assert densities[1] < densities[2] < densities[0] < densities[3]
    assert read_config(folder)["predictor"]["density"] == pytest.approx(
        densities[found.chosen or 0]
    )

    from turbosparse.predictors.score import CALIBRATED
    from turbosparse.training.sample import sequences

    ids = sequences(folder, load_model(folder).config, [text], 2048)
    ids = ids[torch.arange(len(ids)) % CALIBRATED > 0]
    model = load_model(made(family), dtype=torch.float32).eval()

    def loss() -> float:
        with torch.inference_mode():
            return float(model(ids, labels=ids).loss)

    plain = loss()
    with predicted(model, made(family)):
        masked = loss()
    assert torch.tensor(plain).exp() == pytest.approx(found.perplexity, rel=1e-4)
    assert torch.tensor(masked - plain).exp() == pytest.approx(found.points[0].perplexity, rel=1e-4)


def test_the_cheapest_thresholds_within_the_bound_are_kept_and_packed(
    made: Make, text: Path, tmp_path: Path
) -> None:
    folder = copied(made("llama"), tmp_path / "model")
    before = read_config(folder)["predictor"]
    found = scored(folder, text, bound=-99)
    assert found.chosen is None
    assert read_config(folder)["predictor"]["threshold"] == before["threshold"]
    found = scored(folder, text, bound=1e6, picture=tmp_path / "bytes.png", rounds=1, threads=1)
    assert found.speed is not None
    assert [mode for mode, speed in found.speed.items() if speed.least > 0] == [
        "dense",
        "exact",
        "predicted",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bytes.png", "model"]
    assert found.chosen == 1, "the fewest bytes"
    assert (tmp_path / "bytes.png").read_bytes().startswith(b"\x89PNG")
    assert read_scores(folder) == found
    block = read_config(folder)["predictor"]
    assert block["threshold"] != before["threshold"]
    pack(str(folder), tmp_path / "packed", quant="q8")
    packed = Engine(tmp_path / "packed", mode="predicted").packed.header.ffn.predictor
    assert packed is not None
    assert (packed.perplexity, packed.bytes) == (found.points[1].perplexity, found.points[1].bytes)
    assert packed.bound == 1 + 1e4


@pytest.mark.parametrize("wrong", ["input", "model"])
def test_a_predictor_that_knows_nothing_is_an_error(
    sparse: Make, text: Path, tmp_path: Path, wrong: str
) -> None:
    if wrong == "model":
        folder = merge_predictor(sparse("mistral"), tmp_path / "model", threshold=0.0)
    else:
        folder = tmp_path / "model"
        source = copied(sparse("mistral"), tmp_path / "source")
        tensors = load_file(source / "model.safetensors")
        for name, weight in tensors.items():
            if "post_attention" in name:  # far from one: a predictor sees through a mere factor
                weight.normal_(generator=torch.Generator().manual_seed(1))
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
        train(str(source), folder, data=[text], kind="svd", **SMALL)
        config = read_config(folder)
        config["predictor"]["input"] = "pre_norm"
        (folder / "config.json").write_text(json.dumps(config))
    refused = partial(pytest.raises, TurboSparseError, match="of another model, or reads another")
    with refused():
        scored(folder, text)
    with refused():
        pack(str(folder), tmp_path / "packed", data=[text])
    assert not (tmp_path / "packed").exists()


def test_pack_records_what_it_saw_of_a_predictor(made: Make, text: Path, tmp_path: Path) -> None:
    pack(str(made("llama")), tmp_path / "packed", data=[text])
    about = Engine(tmp_path / "packed").packed.header.ffn.predictor
    assert about is not None
    assert about.norm_recall == pytest.approx(0.99, abs=0.005)
    assert about.perplexity is None
    with pytest.raises(TurboSparseError, match="--data is for q4 and for a predictor, and neither"):
        pack(str(made("llama")), tmp_path / "no", quant="q8", predictor="none", data=[text])


# --- carried --------------------------------------------------------------------------------------


def test_what_powerinfer_is_given_picks_the_same_neurons(text: Path, tmp_path: Path) -> None:
    """Its models have one threshold for all layers."""
    import gguf

    source = plain_model(tmp_path)
    folder = tmp_path / "model"
    how = {"kind": "svd", "reads": "pre_norm", "recall": 0.9999, **SMALL, "share": 0.3}
    train(str(source), folder, data=[text], **how)
    least = [layer[0] for layer in read_config(folder)["predictor"]["threshold"]]
    assert len(set(least)) == 2
    export(str(folder), tmp_path / "apart", to="predictor-pt")
    pack(str(source), tmp_path / "one", quant="f16", predictor=str(tmp_path / "apart"), **F16)
    pack(str(folder), tmp_path / "own", quant="f16", **F16)
    one, own = (
        logits_of(Engine(tmp_path / name, backend="torch", mode="predicted"))
        for name in ("one", "own")
    )
    assert (one[0] - own[0]).norm() < 1e-3 * own[0].norm()
    assert one[1] == pytest.approx(own[1], rel=0.01)
    assert own[1] < 96
    export(str(folder), tmp_path / "file", to="powerinfer-gguf")
    plain = tmp_path / "plain"
    plain.write_bytes(b"GGUF" + (tmp_path / "file").read_bytes()[4:])
    reader = gguf.GGUFReader(plain)
    assert reader.fields["powerinfer.sparse_threshold"].contents() == -1
    stored = load_file(folder / "predictor.safetensors")["model.layers.1.mlp.predictor.fc2.weight"]
    found = next(tensor.data for tensor in reader.tensors if tensor.name == "blk.1.fc2.weight")
    expected = (stored / -least[1]).half()
    torch.testing.assert_close(torch.tensor(found).view_as(expected), expected)


def test_thresholds_above_zero_cannot_be_made_one(text: Path, tmp_path: Path) -> None:
    folder, how = tmp_path / "model", {"kind": "svd", "reads": "pre_norm", "recall": 0.3, **SMALL}
    train(str(plain_model(tmp_path)), folder, data=[text], **how)
    with pytest.raises(TurboSparseError, match="PowerInfer has one threshold for all layers, this"):
        export(str(folder), tmp_path / "out", to="predictor-pt")
    assert not (tmp_path / "out").exists()


F16: dict[str, Any] = {"predictor_quant": "f16"}


def plain_model(root: Path) -> Path:
    """A sparse model of what the first Llama models compute, which is all that PowerInfer runs."""
    rope = {"rope_type": "default", "rope_theta": 1e4}
    make_model("llama", root / "dense", rope_parameters=rope, attention_bias=False)
    convert(str(root / "dense"), root / "sparse")
    return root / "sparse"


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("dense", {}, "swiglu model: it has no zeros to predict"),
        ("merged", {}, "holds a predictor already; give --replace"),
        ("sparse", {"data": []}, "give --data, a file or folder of text"),
        ("sparse", {"tokens": 200}, "--tokens 200 are 2 sequences of 160; give at least 1280"),
        ("sparse", {"share": 0.01}, "of rank 32, has 27.8% of the weights"),
        ("sparse", {"share": 1.5}, "--share 1.5: give more than 0 and at most 1"),
        ("sparse", {"epochs": 0}, "--epochs 0: give at least 1 of each"),
        ("sparse", {"kind": "sign", "reads": "pre_norm"}, "sign reads what the feed-forward"),
    ],
)
def test_mistakes_are_named_and_nothing_is_left(
    request: pytest.FixtureRequest,
    text: Path,
    tmp_path: Path,
    model: str,
    options: dict[str, Any],
    message: str,
) -> None:
    found = request.getfixturevalue(model)
    source = found if model == "merged" else found("mistral")
    given = {"data": [text]} | SMALL | options
    with pytest.raises(TurboSparseError, match=re.escape(message)):
        train(str(source), tmp_path / "out", **given)
    assert not list(tmp_path.iterdir())


def test_a_model_without_predictor_has_no_score(sparse: Make, text: Path) -> None:
    with pytest.raises(TurboSparseError, match="holds no predictor; make one with `turbosparse pr"):
        scored(sparse("llama"), text)


@pytest.mark.parametrize("kind", ["svd", "sign"])
def test_training_carries_a_predictor_but_not_what_was_measured_of_it(
    made: Make, text: Path, tmp_path: Path, kind: str
) -> None:
    folder = copied(made("llama", kind), tmp_path / "model")
    scored(folder, text)
    recipe = drelu_recipe(folder, text, 16, batch_size=2, tokens=32)
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    train_model(tmp_path / "recipe.yaml", out=tmp_path / "trained")
    block = read_config(folder)["predictor"]
    assert block["perplexity"]
    kept = {key: block[key] for key in ("kind", "input", "threshold")}
    assert read_config(tmp_path / "trained")["predictor"] == kept
    load_model(tmp_path / "trained")
    if kind == "svd":
        shards = [path / "predictor.safetensors" for path in (folder, tmp_path / "trained")]
        assert shards[0].read_bytes() == shards[1].read_bytes()


def test_what_a_score_says_of_a_published_model_is_heard(tmp_path: Path) -> None:
    config = {"model_type": "bamboo", "hidden_act": "relu"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert own_fields(tmp_path)["predictor"]["input"] == "pre_norm"
    block = {"input": "pre_norm", "threshold": [[-1.0]], "perplexity": 1.0}
    (tmp_path / "config.json").write_text(json.dumps(config | {"predictor": block}))
    assert own_fields(tmp_path)["predictor"] == block
