"""A packed folder back to plain tensors: the weights that it stands for."""

from __future__ import annotations

import torch
from torch import Tensor

from turbosparse.hf import families
from turbosparse.ops.quant import dequantise, dequantise_ffn
from turbosparse.packed.format import Packed, ffn_prefix


def state_dict(packed: Packed) -> dict[str, Tensor]:
    """Float32 tensors by their names on disk, neurons in the model's own order."""
    shapes = families.tensor_shapes(packed.config)
    tensors: dict[str, Tensor] = {}
    for name, spec in packed.plan.items():
        if name in shapes:
            data = torch.tensor(packed.tensors[name])
            tensors[name] = dequantise(data, spec.quant, spec.cols) if spec.quant else data
    for layer, expert in families.ffns(packed.config):
        prefix = ffn_prefix(layer, expert)
        order = torch.tensor(packed.tensors[f"{prefix}neuron_order"]).argsort()
        parts = [part[order] for part in dequantise_ffn(packed.ffn(prefix))]
        # a gate that the activation does not read may be anything
        whole = {"gate": parts[0], "up": parts[-2], "down": parts[-1].T}
        names = families.ffn(packed.config, layer, expert)
        tensors |= {name: whole[role] for role, name in names.items()}
    return tensors
