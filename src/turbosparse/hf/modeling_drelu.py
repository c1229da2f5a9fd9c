"""Mistral, Llama and Qwen2 with a dReLU feed-forward (Turbo Sparse §3.2).

Parameter names are those of the stock classes, so a dense folder loads straight into ours. This
file also travels inside exported models, where ``trust_remote_code=True`` runs it without our
package. The mixture-of-experts class lives in a file of its own: transformers reads the source text
of a model's module to decide whether the model has switchable experts.
"""

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from .ffn_activation import combined


class SparseMLP(nn.Module):
    """The gated FFN with a sparse activation; ``[..., hidden] → [..., hidden]``."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        hidden, neurons = config.hidden_size, config.intermediate_size
        self.activation, self.threshold = config.ffn_activation, config.ffn_threshold
        self.gate_proj = nn.Linear(hidden, neurons, bias=False)
        self.up_proj = nn.Linear(hidden, neurons, bias=False)
        self.down_proj = nn.Linear(neurons, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        active = combined(self.gate_proj(x), self.up_proj(x), self.activation, self.threshold)
        y: torch.Tensor = self.down_proj(active)
        return y


def _swap_ffn(model: Any, config: Any) -> None:
    for layer in model.model.layers:
        layer.mlp = SparseMLP(config)
    # a merged predictor is for packed models: this class computes every neuron
    model._keys_to_ignore_on_load_unexpected = [r"\.predictor\."]
    model.post_init()


@strict
class DReLUMistralConfig(MistralConfig):
    model_type = "drelu_mistral"
    hidden_act: str = "relu"
    ffn_activation: str = "drelu"
    ffn_threshold: float = 0.0


class DReLUMistralForCausalLM(MistralForCausalLM):
    config_class = DReLUMistralConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        _swap_ffn(self, config)


@strict
class DReLULlamaConfig(LlamaConfig):
    model_type = "drelu_llama"
    hidden_act: str = "relu"
    ffn_activation: str = "drelu"
    ffn_threshold: float = 0.0


class DReLULlamaForCausalLM(LlamaForCausalLM):
    config_class = DReLULlamaConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        _swap_ffn(self, config)


@strict
class DReLUQwen2Config(Qwen2Config):
    model_type = "drelu_qwen2"
    hidden_act: str = "relu"
    ffn_activation: str = "drelu"
    ffn_threshold: float = 0.0


class DReLUQwen2ForCausalLM(Qwen2ForCausalLM):
    config_class = DReLUQwen2Config

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        _swap_ffn(self, config)
