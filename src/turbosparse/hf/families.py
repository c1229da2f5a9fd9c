"""The tensors of a checkpoint on disk: names and shapes, for the four families. Loads no torch.

Shapes are ``[out, in]`` as in ``nn.Linear``; H hidden, I neurons (intermediate size), V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

FAMILIES = ("mistral", "llama", "qwen2", "mixtral")
PREFIX = "drelu_"  # of the model_type of our classes

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"


class FFNNames(NamedTuple):
    """Where the three matrices of one feed-forward (or one expert) stand."""

    gate: str  # [I, H]
    up: str  # [I, H]
    down: str  # [H, I]


def family(model_type: str) -> str | None:
    """The stock architecture behind a ``model_type``, or None if we do not support it."""
    base = model_type.removeprefix(PREFIX)
    return base if base in FAMILIES else None


def experts(config: Any) -> int:
    """Number of experts of a layer; 0 for a dense model."""
    return config.num_local_experts if family(config.model_type) == "mixtral" else 0


def ffn(layer: int, expert: int | None = None) -> FFNNames:
    """Names of the FFN matrices of `layer`, of its `expert` for a MoE model."""
    if expert is None:
        mlp = f"model.layers.{layer}.mlp."
        return FFNNames(*(f"{mlp}{matrix}_proj.weight" for matrix in ("gate", "up", "down")))
    moe = f"model.layers.{layer}.block_sparse_moe.experts.{expert}."
    return FFNNames(f"{moe}w1.weight", f"{moe}w3.weight", f"{moe}w2.weight")


def predictor(layer: int, expert: int | None = None) -> tuple[str, str]:
    """Names of the fc1 and fc2 of a predictor that is merged into the checkpoint."""
    module = ffn(layer, expert).gate.rsplit(".", 2)[0]
    return f"{module}.predictor.fc1.weight", f"{module}.predictor.fc2.weight"


def ffns(config: Any) -> list[tuple[int, int | None]]:
    """Every (layer, expert) that holds an FFN; expert is None in a dense model."""
    slots: list[int | None] = list(range(experts(config))) or [None]
    return [(layer, expert) for layer in range(config.num_hidden_layers) for expert in slots]


def router(layer: int) -> str:
    return f"model.layers.{layer}.block_sparse_moe.gate.weight"


def attention(config: Any, layer: int) -> dict[str, tuple[int, ...]]:
    """The projections of a layer's attention, biases included."""
    hidden, head = config.hidden_size, config_head_dim(config)
    sizes = {
        "q": (config.num_attention_heads * head, hidden),
        "k": (config.num_key_value_heads * head, hidden),
        "v": (config.num_key_value_heads * head, hidden),
        "o": (hidden, config.num_attention_heads * head),
    }
    biased = {"qwen2": "qkv", "llama": "qkvo" if getattr(config, "attention_bias", False) else ""}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, size in sizes.items():
        prefix = f"model.layers.{layer}.self_attn.{name}_proj"
        shapes[f"{prefix}.weight"] = size
        if name in biased.get(family(config.model_type) or "", ""):
            shapes[f"{prefix}.bias"] = size[:1]
    return shapes


def config_head_dim(config: Any) -> int:
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def norms(config: Any, layer: int) -> dict[str, tuple[int, ...]]:
    prefix = f"model.layers.{layer}."
    return {
        f"{prefix}{norm}_layernorm.weight": (config.hidden_size,)
        for norm in ("input", "post_attention")
    }


def tensor_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this config must hold."""
    hidden, neurons = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        shapes |= attention(config, layer) | norms(config, layer)
        if experts(config):
            shapes[router(layer)] = (experts(config), hidden)
    for layer, expert in ffns(config):
        gate, up, down = ffn(layer, expert)
        shapes |= {gate: (neurons, hidden), up: (neurons, hidden), down: (hidden, neurons)}
    shapes[FINAL_NORM] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, hidden)
    return shapes
