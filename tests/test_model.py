"""One toy model of each family, the same tokens from every backend, mode and quantisation."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CONTEXT, EVERY, WINDOW, Shared, merge_predictor
from greedy import greedy, of_transformers

from turbosparse import _core
from turbosparse.analyse import analyse
from turbosparse.base.errors import TurboSparseError
from turbosparse.engine.engine import Engine
from turbosparse.engine.model import causal_mask
from turbosparse.hf.activations import WITHOUT_ZEROS
from turbosparse.hf.load import load_config, load_model, with_activation
from turbosparse.ops.quant import dequantise
from turbosparse.pack import pack
from turbosparse.packed.format import Packed
from turbosparse.packed.unpack import state_dict

BACKENDS = ("torch", "cpu")  # gpu, on fewer tokens, in test_gpu.py
TOKENS = 100
PROMPT = list(range(20, 20 + WINDOW + 6))  # already beyond the sliding window
PROMPTS = [[token + first for token in PROMPT] for first in range(60)]
SAME_LOGITS = (
    5e-4  # relative RMS between backends: sums in another order, and what rounds to a half
)

Make = Callable[..., Path]


def relative_rms(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value - truth).norm() / truth.norm())


@pytest.fixture(scope="session")
def hot_first(corpus: Path, shared: Shared) -> Make:
    """hot_first(model, name, **settings): that model packed with the statistics of the corpus."""

    def folder(model: Path, name: str, **settings: Any) -> Path:
        stats = shared(
            f"stats-{model.name}", lambda out: analyse(str(model), data=[corpus], out=out)
        )
        with_stats = {"stats": stats / "stats.turbosparse", **settings}
        return shared(name, lambda out: pack(str(model), out, **with_stats))

    return folder


@pytest.fixture(scope="session")
def packed(sparse: Make, hot_first: Make) -> Make:
    """packed(family, quant, activation="drelu"): a packed toy model, hot neurons first."""

    def folder(family: str, quant: str, activation: str = "drelu") -> Path:
        model = sparse(family, activation)
        return hot_first(model, f"packed-{family}-{quant}-{activation}", quant=quant)

    return folder


@pytest.fixture(scope="session")
def predicted(sparse: Make, hot_first: Make, shared: Shared) -> Make:
    """predicted(family, kind): packed in q8 with a predictor, hot neurons first.

    `kind` is sign, or the input of a random merged predictor. About two thirds are candidates.
    """

    def folder(family: str, kind: str) -> Path:
        settings = {
            "input": "post_norm" if kind == "sign" else kind,
            "kind": "sign" if kind == "sign" else "low_rank",
            "threshold": -0.15 if kind == "sign" else -20.0,
        }
        model = shared(
            f"merged-{family}-{kind}", partial(merge_predictor, sparse(family), **settings)
        )
        choice = "sign" if kind == "sign" else "auto"
        return hot_first(model, f"predicted-{family}-{kind}", quant="q8", predictor=choice)

    return folder


def dequantised_hf_model(folder: Path) -> torch.nn.Module:
    """The transformers model whose weights are those that a packed folder stands for."""
    from transformers import AutoModelForCausalLM

    packed = Packed(folder)
    config = with_activation(load_config(folder), packed.activation)
    model = AutoModelForCausalLM.from_config(config)
    fused = fuse_experts(state_dict(packed), config)
    missing, unexpected = model.load_state_dict(fused, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}  # tied
    model.tie_weights()
    return model.eval()


def fuse_experts(tensors: dict[str, torch.Tensor], config: object) -> dict[str, torch.Tensor]:
    """On-disk Mixtral names to the fused ones that the class has in memory, written out by hand."""
    experts = getattr(config, "num_local_experts", 0)
    if not experts:
        return tensors
    out = {
        name.replace("block_sparse_moe", "mlp"): tensor
        for name, tensor in tensors.items()
        if ".experts." not in name
    }
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}.block_sparse_moe.experts"
        gate_up = [
            torch.cat((tensors[f"{prefix}.{e}.w1.weight"], tensors[f"{prefix}.{e}.w3.weight"]))
            for e in range(experts)
        ]
        down = [tensors[f"{prefix}.{e}.w2.weight"] for e in range(experts)]
        out[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.stack(gate_up)
        out[f"model.layers.{layer}.mlp.experts.down_proj"] = torch.stack(down)
    return out


@cache
def hf_greedy(folder: Path) -> tuple[list[int], list[int]]:
    """A prompt, and the greedy tokens of transformers on the dequantised weights."""
    engine = Engine(folder)
    logits = of_transformers(dequantised_hf_model(folder))
    prompt, truth = greedy(logits, PROMPTS, TOKENS, partial(engine_greedy, engine))
    assert len(set(truth)) > 5, "a text that repeats one token would prove little"
    return prompt, truth


def engine_greedy(engine: Engine, prompt: list[int], chunk: int = 512) -> list[int]:
    sequence = engine.sequence(prompt)
    for _ in range(TOKENS):
        sequence.extend([int(engine.step([sequence], chunk=chunk)[0].logits.argmax())])
    return sequence.tokens[len(prompt) :]


def every_logit(engine: Engine, tokens: list[int], mode: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits after every token, and what was used."""
    cache = engine.decoder.new_cache(CONTEXT)
    logits, counts = engine.decoder.step([tokens], [cache], mode=mode, every=True)
    return torch.tensor(logits), torch.tensor(counts)


@pytest.fixture
def restored_isa() -> Iterator[None]:
    before = _core.isa()
    yield
    _core.set_isa(before)


@pytest.mark.parametrize("road", ["torch", *_core.available_isas()])
@pytest.mark.parametrize("family", EVERY)
@pytest.mark.usefixtures("restored_isa")
def test_every_backend_and_instruction_set_prints_the_tokens_of_transformers(
    packed: Make, family: str, road: str
) -> None:
    backend = "torch" if road == "torch" else "cpu"
    if backend == "cpu":
        _core.set_isa(road)
    for quant in ("f16", "q8", "q4"):
        folder = packed(family, quant)
        prompt, truth = hf_greedy(folder)
        for mode in ("dense", "exact"):
            engine = Engine(folder, backend=backend, mode=mode)
            assert engine_greedy(engine, prompt) == truth, (quant, mode)


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "reglu", "relu", "relu2"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_other_activations_print_the_tokens_of_transformers(
    packed: Make, family: str, activation: str
) -> None:
    folder = packed(family, "q8", activation)
    prompt, truth = hf_greedy(folder)
    modes = ("dense",) if activation in WITHOUT_ZEROS else ("dense", "exact")
    for backend in BACKENDS:
        for mode in modes:
            engine = Engine(folder, backend=backend, mode=mode)
            assert engine_greedy(engine, prompt) == truth, (backend, mode)


@pytest.mark.parametrize("kind", ["pre_norm", "post_norm", "sign"])
@pytest.mark.parametrize("family", EVERY)
def test_predicted_mode_prints_the_same_tokens_on_every_backend(
    predicted: Make, family: str, kind: str
) -> None:
    folder = predicted(family, kind)
    reference = Engine(folder, backend="torch", mode="predicted")
    engine = Engine(folder, backend="cpu", mode="predicted")
    prompt, truth = greedy(
        lambda tokens: every_logit(reference, tokens, "predicted")[0],
        PROMPTS, TOKENS, partial(engine_greedy, engine),
    )  # fmt: skip
    assert len(set(truth)) > 5, "a text that repeats one token would prove little"
    assert engine_greedy(engine, prompt) == truth
    assert engine_greedy(engine, prompt, chunk=7) == truth
    assert engine_greedy(Engine(folder, mode="exact"), prompt) != truth, "it must matter"


@pytest.mark.parametrize("where", ["pre_norm", "post_norm"])
def test_a_predictor_reads_the_input_that_it_was_made_for(predicted: Make, where: str) -> None:
    """transformers on the same weights, the predictor between its layers written out by hand."""
    folder = predicted("mistral", where)
    packed, model = Packed(folder), dequantised_hf_model(folder)
    seen: dict[str, torch.Tensor] = {}
    for index, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{index}."
        parts = packed.tensors[f"{prefix}predictor.fc1"], packed.tensors[f"{prefix}predictor.fc2"]
        fc1, fc2 = (
            dequantise(torch.tensor(part), "q8", cols)
            for part, cols in zip(parts, (64, len(parts[0])), strict=True)
        )
        own = torch.tensor(packed.tensors[f"{prefix}neuron_order"]).argsort()  # as the model has it
        layer.post_attention_layernorm.register_forward_hook(
            lambda _, x, y: seen.update(pre_norm=x[0], post_norm=y)
        )
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda _, x, fc1=fc1, fc2=fc2[own]: (
                x[0] * ((seen[where] @ fc1.T).relu() @ fc2.T >= -20.0),
            )
        )
    with torch.inference_mode():
        truth = model(torch.tensor([PROMPT])).logits[0]
    for backend in BACKENDS:
        engine = Engine(folder, backend=backend, mode="predicted")
        logits, _ = every_logit(engine, PROMPT, "predicted")
        assert relative_rms(logits, truth) < 3e-3


@pytest.mark.parametrize("family", EVERY)
def test_f16_logits_are_those_of_the_source_model(packed: Make, sparse: Make, family: str) -> None:
    """Packing to f16 loses at most fp16's rounding of the float32 weights."""
    source = load_model(sparse(family)).eval()
    with torch.inference_mode():
        truth = source(torch.tensor([PROMPT])).logits[0]
    engine = Engine(packed(family, "f16"), backend="torch", mode="dense")
    logits, _ = every_logit(engine, PROMPT, "dense")
    assert relative_rms(logits, truth) < 3e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", EVERY)
def test_exact_mode_equals_dense_mode(packed: Make, family: str, backend: str) -> None:
    results = {}
    for mode in ("dense", "exact"):
        engine = Engine(packed(family, "q4"), backend=backend, mode=mode)
        results[mode] = every_logit(engine, PROMPT, mode)
    (dense_logits, dense_counts), (exact_logits, exact_counts) = results["dense"], results["exact"]
    assert relative_rms(exact_logits, dense_logits) < SAME_LOGITS
    assert torch.equal(exact_counts, dense_counts)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", EVERY)
def test_sequences_of_a_batch_do_not_see_each_other(
    packed: Make, family: str, backend: str
) -> None:
    """Eight sequences of different lengths in one step give the logits that each gives alone."""
    check_batch(Engine(packed(family, "q4"), backend=backend).decoder, "exact")


@pytest.mark.parametrize("isa", _core.available_isas())
@pytest.mark.parametrize("quant", ["q4", "q8", "f16"])
@pytest.mark.parametrize("family", ["mistral", "mixtral"])
@pytest.mark.usefixtures("restored_isa")
def test_logits_do_not_depend_on_batch_and_chunks(
    packed: Make, family: str, quant: str, isa: str
) -> None:
    """To the last bit: who is served beside a text does not change it."""
    _core.set_isa(isa)
    for mode in ("dense", "exact"):
        engine = Engine(packed(family, quant), threads=2, mode=mode)
        expected = engine.step([engine.sequence(PROMPT)])[0].logits
        batch = [engine.sequence(PROMPT[-length:]) for length in (30, 1, 4, 9, 30)]
        for chunk in (1, 3, 64):
            for sequence in batch:
                sequence.drop()
            found = engine.step(batch, chunk=chunk)[0].logits
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", ["pre_norm", "sign"])
@pytest.mark.parametrize("family", ["mistral", "mixtral"])
def test_sequences_of_a_predicted_batch_do_not_see_each_other(
    predicted: Make, family: str, kind: str
) -> None:
    check_batch(Engine(predicted(family, kind)).decoder, "predicted")


def check_batch(decoder: Any, mode: str) -> None:
    def step(texts: list[list[int]], caches: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(map(torch.tensor, decoder.step(texts, caches, mode=mode)))

    texts = [PROMPT[:length] for length in (1, 3, 8, 13, 21, 25, 28, 30)]
    caches = [decoder.new_cache(CONTEXT) for _ in texts]
    together, _ = step(texts, caches)
    more, counts = step([[7]] * 8, caches)
    for row, text in enumerate(texts):
        cache = decoder.new_cache(CONTEXT)
        alone, _ = step([text], [cache])
        assert relative_rms(together[row], alone[0]) < SAME_LOGITS
        alone, used = step([[7]], [cache])
        assert relative_rms(more[row], alone[0]) < SAME_LOGITS
        assert (counts[:, row] - used[:, 0]).abs().max() <= 2  # signs near zero


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_full_context_of_one_sequence_changes_nothing(packed: Make, backend: str) -> None:
    decoder = Engine(packed("llama", "q8"), backend=backend).decoder
    caches = [decoder.new_cache(CONTEXT), decoder.new_cache(4)]
    decoder.step([[5], [5, 6, 7, 8]], caches, mode="exact")
    with pytest.raises(TurboSparseError, match="5 tokens do not fit the context of 4"):
        decoder.step([[9], [9]], caches, mode="exact")
    assert [cache.length for cache in caches] == [1, 4]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", EVERY)
def test_a_prompt_in_chunks_equals_token_by_token(packed: Make, family: str, backend: str) -> None:
    engine = Engine(packed(family, "q8"), backend=backend)
    whole, *others = (
        torch.tensor(engine.step([engine.sequence(PROMPT)], chunk=chunk)[0].logits)
        for chunk in (512, 1, 7)
    )
    for logits in others:
        assert relative_rms(logits, whole) < SAME_LOGITS


@pytest.mark.parametrize("family", ["mixtral", "nemotron"])
def test_counts_are_those_of_the_analysis(packed: Make, corpus: Path, family: str) -> None:
    """The engine and `analyse` see the same neurons fire."""
    from turbosparse.analysis.measure import measure
    from turbosparse.hf.load import load_tokenizer

    folder = packed(family, "f16")
    model, tokenizer = dequantised_hf_model(folder), load_tokenizer(folder)
    text = corpus.read_text()[:150]
    stats = measure(model, tokenizer, {"one": [text]})
    tokens = tokenizer(text)["input_ids"][:-1]  # the last token predicts nothing
    engine = Engine(folder, backend="cpu")
    _, counts = every_logit(engine, tokens, "exact")
    expected = torch.stack((stats.gate_positive.sum((1, 2)), stats.active.sum((1, 2))), 1)
    counts = counts[:, :, 1:]
    # the half-precision cache may turn the sign of a pre-activation near zero
    assert (counts.sum(1) - expected).abs().max() <= 0.002 * expected.max()


def test_neurons_stand_hot_first(packed: Make, sparse: Make, corpus: Path, tmp_path: Path) -> None:
    from turbosparse.packed.stats import Stats

    analyse(str(sparse("mistral")), data=[corpus], out=tmp_path)
    stats = Stats.load(tmp_path / "stats.turbosparse")
    order = Packed(packed("mistral", "q8")).tensors["model.layers.1.neuron_order"]
    counts = stats.active[1, 0][order.tolist()]
    assert counts.tolist() == sorted(counts.tolist(), reverse=True)
    assert counts[0] > counts[-1]


def test_the_cache_grows_to_the_context_and_not_beyond(packed: Make) -> None:
    engine = Engine(packed("llama", "q8"))
    sequence = engine.sequence(range(2, CONTEXT + 2))
    engine.step([sequence])
    assert sequence.length == CONTEXT
    message = f"{CONTEXT + 1} tokens do not fit the context of {CONTEXT}"
    with pytest.raises(TurboSparseError, match=message):
        sequence.extend([5])


@pytest.mark.parametrize("activation", WITHOUT_ZEROS)
def test_what_has_no_zeros_has_no_exact_mode(packed: Make, activation: str) -> None:
    folder = packed("llama", "q8", activation)
    assert Engine(folder).mode == "dense"
    for mode in ("exact", "predicted"):
        with pytest.raises(TurboSparseError, match="no exact zeros"):
            Engine(folder, mode=mode)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_decoder_without_predictor_refuses_predicted_mode(packed: Make, backend: str) -> None:
    engine = Engine(packed("llama", "q8"), backend=backend)
    cache = engine.decoder.new_cache(CONTEXT)
    with pytest.raises(ValueError, match="predicted mode needs a predictor"):
        engine.decoder.step([[5]], [cache], mode="predicted")
    assert cache.length == 0


def test_rope_with_changing_frequencies_is_refused(packed: Make, tmp_path: Path) -> None:
    import json
    import shutil

    folder = shutil.copytree(packed("mistral", "q8"), tmp_path / "dynamic")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(TurboSparseError, match="rope_type is 'dynamic'"):
        Engine(folder)


def test_an_instruction_set_that_is_not_there_is_named(packed: Make) -> None:
    script = f"from turbosparse.engine.engine import Engine; Engine({str(packed('llama', 'q8'))!r})"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"TURBOSPARSE_ISA": "sse9"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "TurboSparseError: the instruction set (TURBOSPARSE_ISA) is 'sse9'" in done.stderr
    assert _core.isa() in done.stderr


def test_threads_outside_the_machine_are_refused(packed: Make) -> None:
    with pytest.raises(TurboSparseError, match="--threads 4096: this process may use 1 to"):
        Engine(packed("llama", "q8"), threads=4096)


def test_mask_of_a_window() -> None:
    assert causal_mask(2, 4, 2).tolist() == [[False, True, True, False], [False, False, True, True]]


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn"])
def test_rotary_frequencies_are_those_of_transformers(dense: Make, family: str, kind: str) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from turbosparse.engine.positions import rope

    config = load_config(dense(family))
    config.head_dim = 64
    config.rope_parameters = {
        "rope_type": kind,
        "rope_theta": 1e6,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 2048,
    }
    if kind in ("default", "linear"):
        for name in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
            del config.rope_parameters[name]
    truth = LlamaRotaryEmbedding(config)
    frequencies, scale = rope(config.rope_parameters, 64)
    assert frequencies.tolist() == pytest.approx(truth.inv_freq.tolist(), rel=1e-6)
    assert scale == pytest.approx(truth.attention_scaling)
