"""The synthetic models and the benchmark over them; timings are not asserted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from turbosparse.base.errors import TurboSparseError
from turbosparse.base.machine import processor
from turbosparse.bench import _Ours, bench
from turbosparse.benchmark.harness import Memory
from turbosparse.engine.cost import bytes_per_step
from turbosparse.engine.engine import Engine
from turbosparse.hf.count import count_parameters
from turbosparse.ops.quant import dequantise
from turbosparse.ops.rows import QUANTS
from turbosparse.packed.format import Packed
from turbosparse.packed.synthetic import SHAPES, Wanted, make_synthetic


@pytest.fixture(autouse=True)
def toy_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = SHAPES["llama-15m"] | {"vocab_size": 512, "num_hidden_layers": 2}
    moe = SHAPES["mixtral-8x7b"] | {
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    ends = {"bos_token_id": 0, "eos_token_id": 1}
    monkeypatch.setitem(SHAPES, "llama-toy", toy)
    monkeypatch.setitem(SHAPES, "arcee-toy", toy | {"model_type": "arcee", **ends})
    monkeypatch.setitem(SHAPES, "mixtral-toy", moe)


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("shape", ["llama-toy", "mixtral-toy", "arcee-toy"])
def test_a_synthetic_model_computes_the_asked_sparsity(
    tmp_path: Path, shape: str, quant: str
) -> None:
    make_synthetic(tmp_path / "model", Wanted(shape), quant=quant)
    engine = Engine(tmp_path / "model", backend="torch")  # the truth, not the kernels
    (step,) = engine.step([engine.sequence(range(3, 99))])
    gates = 0.1 if shape == "arcee-toy" else 0.1**0.5
    assert step.gate_positive == pytest.approx(gates, abs=0.03)
    assert step.active == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("quant", QUANTS)
def test_synthetic_weights_have_one_deviation(tmp_path: Path, quant: str) -> None:
    make_synthetic(tmp_path / "model", Wanted("llama-toy", 0.0), quant=quant)
    packed = Packed(tmp_path / "model")
    assert packed.activation == "swiglu"
    data = torch.tensor(packed.tensors["model.layers.0.self_attn.q_proj.weight"])
    weights = dequantise(data, quant, 288)
    assert float(weights.std()) == pytest.approx(0.02, rel=0.03)
    assert abs(float(weights.mean())) < 0.001


def test_bench_reports_what_it_measured(tmp_path: Path) -> None:
    card = bench(
        shape="mixtral-toy", folder=tmp_path / "kept", tokens=3, rounds=2, prefill=20, threads=1
    )
    assert (tmp_path / "kept").is_dir()
    assert card.mode == "exact"
    assert card.threads == 1
    assert card.activation_sparsity == pytest.approx(0.9, abs=0.03)
    assert card.prefill_tokens_per_second is not None
    json.dumps(card.bytes)


def test_shares_of_the_ceiling_are_round_by_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory, rates, decode = iter([10.0, 20.0, 30.0, 50.0]), iter([0.0, 6.0, 8.0]), _Ours.decode
    monkeypatch.setattr(Memory, "read_speed", lambda _: next(memory))
    monkeypatch.setattr(_Ours, "decode", lambda *given: (decode(*given), next(rates))[1])
    card = bench(shape="llama-toy", tokens=2, rounds=2, threads=1)
    assert (card.bandwidth.least, card.bandwidth.median, card.bandwidth.greatest) == (15, 27.5, 40)
    assert str(card.tokens_per_second) == "7.00 [6.00..8.00]"
    size = sum(card.bytes.values()) / 1e9
    assert card.ceiling == pytest.approx(27.5 / size)
    assert card.share_of_ceiling.least == pytest.approx(8 * size / 40)
    assert card.share_of_ceiling.greatest == pytest.approx(6 * size / 15)


def test_the_machine_is_named_with_its_processor(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor: 0\nmodel name\t: Fast One: 9000\nflags: a\n")
    assert processor(tmp_path / "cpuinfo") == "Fast One: 9000"


@pytest.mark.parametrize("shape", ["llama-toy", "mixtral-toy"])
@pytest.mark.parametrize("quant", QUANTS)
def test_a_synthetic_predictor_knows_its_neurons(tmp_path: Path, shape: str, quant: str) -> None:
    card = bench(
        shape=shape,
        quant=quant,
        predictor="rank=64",
        folder=tmp_path / "kept",
        tokens=24,
        rounds=1,
        threads=1,
    )
    assert card.mode == "predicted"
    assert card.recall is not None
    assert card.recall > (0.9 if quant == "q4" else 0.97)
    assert card.candidates == pytest.approx(0.11, abs=0.03)
    assert card.activation_sparsity == pytest.approx(0.9, abs=0.03)
    engine = Engine(tmp_path / "kept", mode="exact", backend="torch")
    (step,) = engine.step([engine.sequence(range(3, 99))])
    assert step.gate_positive == pytest.approx(0.1**0.5, abs=0.04)
    assert step.active == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("shape", ["llama-toy", "mixtral-toy", "arcee-toy"])
def test_signs_of_a_synthetic_model_let_the_wanted_share_pass(shape: str) -> None:
    card = bench(shape=shape, predictor="sign", tokens=24, rounds=1, threads=1)
    assert card.mode == "predicted"
    assert card.recall is not None
    assert 0.3 < card.recall < 0.9, "signs say something, but little, of random weights"
    assert card.candidates == pytest.approx(0.12, abs=0.05)


@pytest.mark.parametrize("predictor", ["rank=64", "sign"])
def test_bytes_of_predicted_mode(tmp_path: Path, predictor: str) -> None:
    wanted = Wanted("mixtral-toy", predictor=predictor)
    make_synthetic(tmp_path / "model", wanted, quant="q8")
    engine = Engine(tmp_path / "model", mode="predicted")
    cache = engine.decoder.new_cache(1)
    _, counts = engine.decoder.step([[7]], [cache], mode="predicted")
    sizes = bytes_per_step(engine, counts[None], positions=10)
    row = 256 + 2 * 8  # int8 weights, scales
    candidates, gate, active = counts[:, 0].sum(0).tolist()
    assert sizes["gates"] == pytest.approx(row * candidates)
    assert sizes["ups"] == pytest.approx(row * gate)
    assert sizes["downs"] == pytest.approx(row * active)
    layers, used, neurons = 2, 2, 512
    if predictor == "sign":
        share = candidates / (layers * used * neurons)
        expected = 64 * neurons * (1 + share**0.5)  # 256 bits in 64 bytes: gate, part of up
    else:
        expected = 64 * row + neurons * 80  # fc1; fc2 of 64 int8 and 2 scales, padded to 16
    assert sizes["predictors"] == pytest.approx(layers * used * expected)


@pytest.mark.parametrize(
    "other", [{"shape": "mixtral-toy"}, {"quant": "q8"}, {"sparsity": 0.5}, {"predictor": "sign"}]
)
def test_a_kept_model_of_another_kind_is_not_measured(
    tmp_path: Path, other: dict[str, object]
) -> None:
    make_synthetic(tmp_path / "kept", Wanted("llama-toy"), quant="q4")
    with pytest.raises(TurboSparseError, match="kept holds synthetic llama-toy, sparsity"):
        bench(**({"shape": "llama-toy"} | other), folder=tmp_path / "kept")  # type: ignore[arg-type]


def test_a_synthetic_model_is_removed_unless_a_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    bench(shape="llama-toy", tokens=1, rounds=1, threads=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", ["dense", "exact"])
def test_bytes_of_one_token_are_those_of_the_rows_it_reads(tmp_path: Path, mode: str) -> None:
    make_synthetic(tmp_path / "model", Wanted("mixtral-toy"), quant="q8")
    engine = Engine(tmp_path / "model", mode=mode)  # type: ignore[arg-type]
    cache = engine.decoder.new_cache(1)
    _, counts = engine.decoder.step([[7]], [cache], mode="exact")
    sizes = bytes_per_step(engine, counts[None], positions=10)
    row = 256 + 2 * 8  # int8 weights, scales
    _, gate, active = counts[:, 0].sum(0).tolist()
    layers, used, neurons = 2, 2, 512
    assert sizes["gates"] == pytest.approx(row * layers * used * neurons)
    if mode == "exact":
        assert sizes["ups"] == pytest.approx(row * gate)
        assert sizes["downs"] == pytest.approx(row * active)
    else:
        assert sizes["ups"] == sizes["downs"] == sizes["gates"]
    assert sizes["head"] == engine.packed.tensors["lm_head.weight"].nbytes
    assert sizes["keys and values"] == 10 * 2 * 2 * 2 * 64 * layers


@pytest.mark.parametrize("predictor", [None, "rank=64", "sign"])
def test_bytes_of_an_ungated_feed_forward(tmp_path: Path, predictor: str | None) -> None:
    """All up rows, as gates, or those of the candidates; of the active neurons the down columns."""
    make_synthetic(tmp_path / "model", Wanted("arcee-toy", predictor=predictor), quant="q8")
    mode = "predicted" if predictor else "exact"
    engine = Engine(tmp_path / "model", mode=mode)  # type: ignore[arg-type]
    _, counts = engine.decoder.step([[7]], [engine.decoder.new_cache(1)], mode=engine.mode)
    sizes = bytes_per_step(engine, counts[None], positions=10)
    candidates, gate, active = counts[:, 0].sum(0).tolist()
    assert gate == active
    assert active < (0.14 if predictor else 0.12) * 2 * 768
    row = 288 + 2 * 9 + 14  # int8 weights, scales, up to a multiple of 16
    assert (sizes["gates"], sizes["ups"], sizes["downs"]) == pytest.approx(
        (row * candidates, 0, row * active)
    )
    if predictor == "sign":
        assert sizes["predictors"] == 2 * 768 * 64


def test_parameters_that_exact_mode_reads_of_afm() -> None:
    """At 90 % zeros: all of the up projections, a tenth of the down projections."""
    config = AutoConfig.for_model(**SHAPES["afm-4.5b"], hidden_act="relu2")
    found = count_parameters(config, active=0.1, gate_positive=0.1)
    hidden, neurons, layers = 2560, 18432, 36
    attention = layers * (2 * 2560 * hidden + 2 * 512 * hidden)
    outside = attention + 128004 * hidden + (2 * layers + 1) * hidden
    assert found.total == outside + 128004 * hidden + 2 * layers * hidden * neurons
    assert found.read_exact == outside + hidden + round(1.1 * layers * hidden * neurons)
    assert found.activated == outside + hidden + round(0.2 * layers * hidden * neurons)


def test_rows_shared_by_sequences_count_once(tmp_path: Path) -> None:
    make_synthetic(tmp_path / "model", Wanted("llama-toy"), quant="q8")
    engine = Engine(tmp_path / "model")
    neurons = engine.config.intermediate_size
    everything = np.full((1, 2, 4, 3), float(neurons))
    half = everything / 2
    whole, shared = (bytes_per_step(engine, counts, 0)["ups"] for counts in (everything, half))
    assert shared == pytest.approx(whole * (1 - 0.5**4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either a packed folder or a --shape"),
        ({"shape": "gpt-9"}, "shape 'gpt-9' is unknown; use mistral-7b"),
        ({"shape": "llama-toy", "sparsity": 1.0}, "sparsity 1 must be 0 or more and less than 1"),
        ({"shape": "llama-toy", "batch": 17}, "--batch 17 must be 1 to 16"),
        ({"shape": "llama-toy", "batch": 2, "peer": "llama.cpp"}, "measured with one sequence"),
        ({"shape": "llama-toy", "predictor": "rank=48"}, "'rank=48' is unknown; use sign, or"),
        ({"shape": "llama-toy", "predictor": "oracle"}, "'oracle' is unknown; use sign, or rank=N"),
        ({"shape": "llama-toy", "predictor": "sign", "sparsity": 0.0}, "no zeros to predict"),
        *(
            (
                {"model": Path("packed"), name: value},
                f"--{name.replace('_', '-')} {value}: only for",
            )
            for name, value in {
                "sparsity": 0.0,
                "quant": "q4",
                "layers": 2,
                "predictor": "sign",
                "predictor_quant": "q8",
                "folder": Path("kept"),
            }.items()
        ),
        ({"shape": "llama-toy", "predictor_quant": "q8"}, "q8 needs a --predictor rank=N"),
        ({"shape": "llama-toy", "mode": "predicted"}, "holds no predictor"),
        ({"shape": "llama-toy", "rounds": 0}, "--rounds 0 must be 1 or more"),
        ({"shape": "llama-toy", "quant": "q8", "peer": "openvino"}, "0 experts and drelu in q8"),
        ({"shape": "llama-toy", "sparsity": 0.0, "mode": "exact"}, "no exact zeros to skip"),
        ({"shape": "arcee-toy", "sparsity": 0.0}, "sparsity 0 makes a swiglu model, and arcee-toy"),
    ],
)
def test_wrong_requests_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(TurboSparseError, match=message):
        bench(**arguments)  # type: ignore[arg-type]


LLAMA = """
import os, signal

class Llama:
    def __init__(self, path, n_batch, **settings):
        print("opened", path)  # what a library prints is no answer
        self.batch = n_batch
    def n_vocab(self):
        return 9
    def reset(self):
        pass
    def eval(self, tokens):
        if len(tokens) >= DIES:
            os.kill(os.getpid(), signal.SIGILL)
"""


@pytest.fixture
def llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes a llama.cpp that dies of so many tokens at once."""

    def make(dies: int) -> None:
        (tmp_path / "llama_cpp.py").write_text(LLAMA.replace("DIES", str(dies)))

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return make


def test_a_peer_that_dies_of_batches_reads_token_by_token(
    llama: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    llama(2)
    card = bench(shape="llama-toy", rounds=2, tokens=2, prompt=3, prefill=4, peer="llama.cpp")
    assert card.peer_tokens_per_second
    assert card.peer_prefill_tokens_per_second
    (line,) = capsys.readouterr().err.splitlines()
    assert "llama.cpp died in a prompt of 3 tokens and 2 more: SIGILL; its prompts go" in line


def test_a_peer_that_dies_does_not_end_the_measurement(
    llama: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    llama(1)
    card = bench(shape="llama-toy", rounds=2, tokens=2, peer="llama.cpp")
    assert (card.peer, card.ratio) == (None, None)
    assert card.tokens_per_second.median > 0
    assert "; the rest is measured without it" in capsys.readouterr().err.splitlines()[-1]


def test_openvino_is_a_peer_where_it_is_installed() -> None:
    pytest.importorskip("openvino", reason="openvino is not installed: the peer is not tested")
    card = bench(shape="llama-toy", rounds=1, tokens=2, prompt=3, prefill=4, peer="openvino")
    assert card.peer_tokens_per_second
    assert card.peer_prefill_tokens_per_second
