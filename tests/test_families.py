"""The tensor tables in both directions, and the schema of config.json against transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import EVERY
from safetensors.numpy import load_file

from turbosparse import _core
from turbosparse.base.errors import TurboSparseError
from turbosparse.hf import families
from turbosparse.hf.activations import ACTIVATIONS
from turbosparse.hf.config import ModelConfig, parse, read_model_config
from turbosparse.hf.load import activation_of, load_config, new_config


@pytest.mark.parametrize("family", EVERY)
def test_names_and_places_say_the_same(dense: Callable[[str], Path], family: str) -> None:
    folder = dense(family)
    config = read_model_config(folder)
    table = families.table(config)
    found = families.tensors(config)
    stored = load_file(folder / "model.safetensors")
    assert {t.name: t.shape for t in found} == {name: t.shape for name, t in stored.items()}
    for tensor in found:
        assert table.find(tensor.name) == (tensor.row, tensor.layer, tensor.expert)
        assert table.name(tensor.role, tensor.layer, tensor.expert) == tensor.name
    for foreign in ("model.layers.01.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.scale", ""):
        assert table.find(foreign) is None


def test_a_dialect_is_one_table(dense: Callable[[str], Path]) -> None:
    config = read_model_config(dense("mixtral"))
    dialect = families.table(config).renamed(
        {"q": "blk.{layer}.attn_q", "gate": "blk.{layer}.gates", "up": "blk.{layer}.{expert}.up"}
    )
    shapes = {tensor.name: tensor.shape for tensor in dialect.tensors(config)}
    assert shapes["blk.1.attn_q"] == (64, 64)
    assert shapes["blk.1.gates"] == (4, 96, 64)  # the experts of a layer, stacked
    assert shapes["blk.1.3.up"] == (96, 64)
    row, layer, expert = dialect.find("blk.1.3.up") or pytest.fail("not found")
    name = families.table(config).name(row.role, layer, expert)
    assert name == "model.layers.1.block_sparse_moe.experts.3.w3.weight"


NEMOTRON = {"model_type": "nemotron", "num_key_value_heads": 8}


def same(folder: Path) -> None:
    """The schema reads a folder as transformers does."""
    theirs, ours = load_config(folder), read_model_config(folder)
    for field in ModelConfig.model_fields:
        expected = getattr(theirs, field, None)
        found = getattr(ours, field)
        if field == "head_dim":
            expected = families.config_head_dim(theirs)
        if field == "rope_parameters":
            expected.pop("type", None)  # the older name of rope_type
        if field in ("attention_bias", "mlp_bias", "use_sliding_window"):
            expected = bool(expected)
        assert found == expected, field


@pytest.mark.parametrize("family", EVERY)
def test_the_schema_reads_as_transformers_does(
    dense: Callable[[str], Path], sparse: Callable[..., Path], family: str
) -> None:
    same(dense(family))
    same(sparse(family))
    same(sparse(family, "reglu"))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rope_theta": 5e5, "num_key_value_heads": 4, "head_dim": None},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 7},
        {"rope_scaling": {"type": "yarn", "factor": 4, "beta_fast": 16}, "eos_token_id": [1, 2]},
        {"bos_token_id": None, "eos_token_id": -1, "pad_token_id": -1, "hidden_act": "silu"},
    ],
)
@pytest.mark.parametrize("family", EVERY)
def test_defaults_and_older_keys(tmp_path: Path, family: str, fields: dict[str, Any]) -> None:
    own = {"arcee": {"vocab_size": 128004}, "nemotron": {"num_key_value_heads": 8}}.get(family)
    raw = {"model_type": family, **fields, **({**own, "hidden_act": "relu"} if own else {})}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    same(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts_per_tok": None}, "num_experts_per_tok is None"),
        ({"num_experts_per_tok": 9}, "more than num_local_experts 8"),
        ({"sliding_window": 1.5}, "sliding_window is 1.5"),
        ({"sliding_window": -5}, "sliding_window is -5"),
        ({"sliding_window": 2**40}, "sliding_window is 1099511627776"),
        ({"rope_theta": "x"}, "rope_theta is 'x'"),
        ({"rope_theta": None}, "rope_theta is None"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": -4}}, "factor is -4"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "'yarn' needs factor"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2}}, "rope_type is 'dynamic'"),
        ({"rope_scaling": [1]}, "not an object"),
        ({"partial_rotary_factor": "x"}, "partial_rotary_factor is 'x'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5: mixtral rotates whole"),
        ({**NEMOTRON, "partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5"),
        ({**NEMOTRON, "partial_rotary_factor": 0.4, "head_dim": 128}, "of which 51 would be"),
        ({**NEMOTRON, "num_key_value_heads": None}, "num_key_value_heads is None"),
        ({**NEMOTRON, "norm_eps": None}, "norm_eps is None"),
        ({**NEMOTRON, "norm_eps": -1}, "norm_eps is -1"),
        ({**NEMOTRON, "mlp_bias": True}, "mlp_bias=true is not supported"),
        ({**NEMOTRON, "hidden_act": "silu"}, "'silu' is not supported; known are relu, relu2"),
        ({"model_type": "drelu_arcee"}, "model_type 'drelu_arcee' is not supported"),
        ({"eos_token_id": [[]]}, "eos_token_id"),
        ({"pad_token_id": 999_999}, "pad_token_id 999999 is outside vocab_size 32000"),
        ({"pad_token_id": -600}, "pad_token_id is -600"),
        ({"bos_token_id": 32000}, "bos_token_id 32000 is outside vocab_size 32000"),
        ({"eos_token_id": 32064}, "eos_token_id 32064 is outside vocab_size 32000"),
        ({"eos_token_id": [2, 32007]}, "eos_token_id 32007 is outside vocab_size 32000"),
        ({"hidden_act": "fatrelu"}, "hidden_act 'fatrelu' is not supported; known are relu, silu"),
        (
            {"model_type": "drelu_llama", "hidden_act": "fatrelu"},
            "hidden_act 'fatrelu' is not supported; known are gelu, relu, relu2, silu",
        ),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"num_key_value_heads": 7}, "not a multiple of num_key_value_heads 7"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"head_dim": 33}, "head_dim is 33"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
        ({"max_position_embeddings": "4096"}, "max_position_embeddings is '4096'"),
        ({"model_type": ["mixtral"]}, "model_type"),
        ({"ffn_activation": "gelu"}, "ffn_activation is 'gelu'"),
    ],
)
def test_one_wrong_value_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(TurboSparseError) as error:
        parse({"model_type": "mixtral", **fields}, "config.json")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "context"),
    [
        ({}, 32768),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 131072),
        (
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 32768,
                },
            },
            131072,
        ),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 32768),
    ],
)
def test_yarn_makes_the_context_longer(fields: dict[str, Any], context: int) -> None:
    assert parse({"model_type": "qwen2", **fields}, "config.json").context == context


def test_a_new_model_has_the_activation_of_its_family() -> None:
    arcee = {"model_type": "arcee", "vocab_size": 128004}
    for fields, asked, activation, kind in (
        ({"model_type": "llama"}, None, "swiglu", "llama"),
        ({"model_type": "llama"}, "relu2", "relu2", "drelu_llama"),
        (arcee, None, "relu2", "arcee"),
        (arcee, "relu", "relu", "arcee"),
    ):
        made = new_config(fields, activation=asked)
        assert (activation_of(made), made.model_type) == (activation, kind)
    with pytest.raises(TurboSparseError, match="arcee models have no gate, which drelu reads"):
        new_config(arcee, activation="drelu")


def test_the_schema_is_light() -> None:
    code = (
        "import sys, turbosparse.hf.config, turbosparse.hf.families;"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_python_and_the_core_name_the_same_activations() -> None:
    with pytest.raises(ValueError, match="activation is 'none', expected one of ") as error:
        _core.Neurons(*np.zeros((2, 1, 64), np.uint8), 32, ["f16"] * 3, "none")
    assert str(error.value).partition("one of ")[2].split(", ") == list(ACTIVATIONS)
