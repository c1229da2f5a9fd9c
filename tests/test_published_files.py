"""The files that others published, rebuilt from our table of tensors: names, sizes, SHA-256."""

from __future__ import annotations

import hashlib
import json
from math import prod
from pathlib import Path
from typing import Any

from published import CONFIGS

from turbosparse.hf import families
from turbosparse.hf.config import read_model_config

_MISTRAL = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


def published_config(folder: Path, kind: str, **sizes: int) -> Any:
    (folder / "config.json").write_text(json.dumps(CONFIGS[kind] | _MISTRAL | sizes))
    return read_model_config(folder)


def parameters(config: Any) -> int:
    return sum(prod(shape) for shape in families.tensor_shapes(config).values())


def test_the_index_of_turbosparse_mistral(tmp_path: Path) -> None:
    """Its 355 names in four shards, by our table: the file on the hub has this size and SHA-256."""
    config = published_config(tmp_path, "bamboo", vocab_size=32064)
    ranks = 40_320  # of all layers together
    total = 2 * (parameters(config) + ranks * (4096 + 14336))
    assert total == 15_970_869_248
    table = families.table(config)
    # the order of the modules, in which the shards are cut, ends with the norms of a layer
    inside = [*"qkvo", *families.FFN_ROLES, "fc1", "fc2", "attention_norm", "ffn_norm"]
    names = [table.name("embedding")]
    names += [table.name(role, layer) for layer in range(32) for role in inside]
    names += [table.name("norm"), table.name("head")]
    cuts = [table.name("fc2", 9), table.name("gate", 20), table.name("gate", 30)]
    shard, homes = 1, {}
    for name in names:
        shard += name in cuts
        homes[name] = f"model-{shard:05}-of-00004.safetensors"
    index = {"metadata": {"total_size": total}, "weight_map": homes}
    text = (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
    assert (len(homes), len(text)) == (355, 29_306)
    digest = "323e96f23791fe336c7bb6b626ff79e35a7e1df43adbb2735e7bd57786c16027"
    assert hashlib.sha256(text).hexdigest() == digest


def test_the_size_of_turbosparse_mixtral(tmp_path: Path) -> None:
    config = published_config(
        tmp_path, "turbosparsemixtral", vocab_size=57_024, num_local_experts=8
    )
    ranks = [896] * 2 + [1024] * 11 + [1088] + [1024] * 13 + [1088] * 4 + [1344]
    predictors = 8 * sum(ranks) * (4096 + 14336)
    assert len(ranks) == 32
    assert 2 * (parameters(config) + predictors) == 103_592_501_248
    assert len(families.tensors(config)) + 2 * 8 * 32 == 1507
