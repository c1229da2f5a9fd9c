"""A dense checkpoint becomes a calibrated dReLU checkpoint, one layer after the other.

A stopped conversion resumes at the last finished layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from turbosparse.base.folders import write_json
from turbosparse.hf import families
from turbosparse.hf.checkpoint import INDEX
from turbosparse.hf.layerwise import Layerwise
from turbosparse.hf.steps import Steps, save, shard_name
from turbosparse.hf.surgery import FFN, fit_layer

HELD_OUT = 8  # every eighth sequence is kept from the fit, to measure it on

Shares = list[list[float | None]]


def convert_layers(model: Layerwise, ids: Tensor, work: Path, *, neurons: int) -> Shares:
    """Fit every layer on text and write it into `work`; resume if some are there.

    Args:
        model: the dense checkpoint, run as drelu.
        ids: token ids of text, ``[N, T]``.
        work: folder of this conversion; see `finish`.
        neurons: of each new feed-forward, at most twice those of the old.

    Returns:
        ``[layer][expert]``: see `surgery.fit_layer`.

    Raises:
        TurboSparseError: `work` holds a conversion with other settings.
    """
    steps = Steps(work, model, ids, {"neurons": neurons}, "conversion")
    hidden = steps.hidden()
    held_out = torch.arange(len(ids)) % HELD_OUT == HELD_OUT - 1
    for index in steps.left("converting layers"):
        shell = model.layer(index)
        new, share = fit_layer(
            model, shell, hidden, neurons=neurons, held_out=held_out, where=f"layer {index}"
        )
        del shell
        steps.finish(_layer(model, index, new), hidden, share)
    return steps.about


def finish(model: Layerwise, work: Path, out: Path) -> None:
    """Move the shards into the model folder `out`; add what is not in a layer, and the index."""
    layers = model.config.num_hidden_layers
    outside = [t.name for t in families.tensors(model.config) if t.layer is None]
    save(work / shard_name(layers), {name: model.checkpoint[name] for name in outside})
    home: dict[str, str] = {}
    total = 0
    for number in range(layers + 1):
        name = f"model-{number + 1:05}-of-{layers + 1:05}.safetensors"
        with safe_open(work / shard_name(number), framework="pt") as shard:
            home |= dict.fromkeys(shard.keys(), name)
        total += (work / shard_name(number)).stat().st_size
        (work / shard_name(number)).rename(out / name)
    write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": home})


def _layer(model: Layerwise, index: int, new: list[FFN]) -> dict[str, Tensor]:
    """All tensors of a layer in the checkpoint's own types, with the new feed-forwards."""
    tensors: dict[str, Tensor] = {}
    for tensor in families.table(model.config).tensors(model.config, [index]):
        weight = model.checkpoint[tensor.name]
        if tensor.role in families.FFN_ROLES:
            made: Any = getattr(new[tensor.expert or 0], tensor.role)
            weight = made.to("cpu", weight.dtype).contiguous()
        tensors[tensor.name] = weight
    return tensors
