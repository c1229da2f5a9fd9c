"""A dense checkpoint becomes a calibrated dReLU checkpoint, one layer after the other.

A stopped conversion resumes at the last finished layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import Parameter

from turbosparse.base.folders import write_json
from turbosparse.hf import families
from turbosparse.hf.checkpoint import INDEX
from turbosparse.hf.layerwise import Layerwise
from turbosparse.hf.reconstruct import reconstruct
from turbosparse.hf.steps import Steps, save, shard_name
from turbosparse.hf.surgery import FFN, explained, fit, weights_of

HELD_OUT = 8  # every eighth sequence is kept from the fit, to measure it on

Shares = list[list[float | None]]


def convert_layers(
    model: Layerwise, ids: Tensor, work: Path, *, neurons: int, passes: int = 0
) -> Shares:
    """Fit every layer on text and write it into `work`; resume if some are there.

    Args:
        model: the dense checkpoint, run as drelu.
        ids: token ids of text, ``[N, T]``.
        work: folder of this conversion; see `finish`.
        neurons: of each new feed-forward, at most twice those of the old.
        passes: over the text in which each is then trained.

    Returns:
        ``[layer][expert]``: see `fit_layer`.

    Raises:
        TurboSparseError: `work` holds a conversion with other settings.
    """
    steps = Steps(work, model, ids, {"neurons": neurons, "passes": passes}, "conversion")
    hidden = steps.hidden()
    held_out = torch.arange(len(ids)) % HELD_OUT == HELD_OUT - 1
    for index in steps.left("converting layers"):
        shell = model.layer(index)
        how: Any = {"neurons": neurons, "passes": passes, "held_out": held_out}
        new, share = fit_layer(model, shell, hidden, **how, where=f"layer {index}")
        del shell
        steps.finish(_layer(model, index, new), hidden, share)
    return steps.about


@torch.no_grad()
def fit_layer(
    model: Layerwise,
    shell: Any,
    hidden: Tensor,
    *,
    neurons: int,
    held_out: Tensor,
    passes: int = 0,
    where: str,
) -> tuple[list[FFN], list[float | None]]:
    """Change the feed-forward of a layer, or those of its experts, and move the states past it.

    Args:
        model, shell: the layer, as `Layerwise.layer` gives it; its activation is drelu.
        hidden: states before the layer, ``[N, T, H]``; overwritten by those after it.
        neurons: of each new FFN, at most twice those of the old.
        held_out: which of the N sequences the fit does not see, bool ``[N]``.
        passes: over the others, in which the new feed-forward is then trained (`reconstruct`).
        where: what messages call the layer.

    Returns:
        The new feed-forwards, one for each expert (one if dense), and of each the share of the
        variance of the dense FFN's output on the held-out text that the new one accounts for: None
        where that does not vary, as of an expert that no token was sent to.
    """
    model.attend(shell, hidden)
    normed = torch.cat([model.ffn_input(shell, part).cpu() for part in model.chunks(hidden)])
    mlp = shell.layers[0].mlp
    new, shares = [], []
    moe = hasattr(mlp, "experts")
    chosen = model.routed(shell, hidden) if moe else None
    for number, old in enumerate(weights_of(mlp)):
        seen, unseen = normed[~held_out], normed[held_out]
        if chosen is not None:
            mine = (chosen == number).any(-1)
            seen, unseen = normed[mine & ~held_out[:, None]], normed[mine & held_out[:, None]]
        seen, unseen = (x.reshape(-1, x.shape[-1]).to(model.device) for x in (seen, unseen))
        at = f"{where}, expert {number}" if moe else where
        tries = [fit(old, seen, neurons, where=at)]
        if passes and len(seen):
            tries.append(reconstruct(old, tries[0], seen, passes))
        judge = unseen if len(unseen) else seen
        found = [(made := ffn.to(old.gate.dtype), explained(old, made, judge)) for ffn in tries]
        made, share = max(found, key=lambda each: each[1] or 0.0)
        shares.append(share)
        new.append(made)
    _put(mlp, new)
    model.feed_forward(shell, hidden)
    return new, shares


def _put(mlp: Any, new: list[FFN]) -> None:
    if not hasattr(mlp, "experts"):
        parts = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        for part, weight in zip(parts, new[0], strict=True):
            part.weight = Parameter(weight, requires_grad=False)
        return
    gate_up = torch.stack([torch.cat(ffn[:2]) for ffn in new])
    mlp.experts.gate_up_proj = Parameter(gate_up, requires_grad=False)
    down = torch.stack([ffn.down for ffn in new])
    mlp.experts.down_proj = Parameter(down, requires_grad=False)


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
