"""Mixtral whose experts are dReLU feed-forwards (Turbo Sparse §4, §5); the router stays as it is.

This file also travels inside exported models, where ``trust_remote_code=True`` runs it without our
package.
"""

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch.nn.functional import linear
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.integrations.moe import use_experts_implementation
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from .ffn_activation import combined

# On disk Mixtral keeps one tensor per expert; in memory transformers fuses them. Classes from
# outside the library do not inherit that conversion.
register_checkpoint_conversion_mapping(
    "drelu_mixtral", get_checkpoint_conversion_mapping("mixtral"), overwrite=True
)


@strict
class DReLUMixtralConfig(MixtralConfig):
    model_type = "drelu_mixtral"
    hidden_act: str = "relu"
    ffn_activation: str = "drelu"
    ffn_threshold: float = 0.0


@use_experts_implementation
class SparseExperts(MixtralExperts):
    """A layer's experts: ``gate_up_proj [E, 2·I, hidden]``, ``down_proj [E, hidden, I]``."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.activation, self.threshold = config.ffn_activation, config.ffn_threshold

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """What the fused implementations (``grouped_mm``, ``batched_mm``, …) call."""
        gate, up = gate_up.chunk(2, dim=-1)
        return combined(gate, up, self.activation, self.threshold)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The ``eager`` implementation: the stock one has its activation written in."""
        out = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert >= self.num_experts:  # the padding index of expert parallelism
                continue
            token, slot = torch.where(top_k_index == expert)
            active = self._apply_gate(linear(hidden_states[token], self.gate_up_proj[expert]))
            y = linear(active, self.down_proj[expert]) * top_k_weights[token, slot, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out


class DReLUMixtralForCausalLM(MixtralForCausalLM):
    config_class = DReLUMixtralConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp.experts = SparseExperts(config)
        self._keys_to_ignore_on_load_unexpected = [r"\.predictor\."]  # see modeling_drelu
        self.post_init()
