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
from turbosparse.hf.surgery import FFN, explained, fit, weights_of, with_usual_gates

HELD_OUT = 8  # every eighth sequence is kept from the fit, to measure it on
_REPAID = 0.5  # of what the states lack by then: all of it does worse (docs/quality.md)
_MASSIVE = 20  # times the median mean square of a token's states

Shares = list[list[float | None]]


def convert_layers(
    model: Layerwise, ids: Tensor, work: Path, *, neurons: int, passes: int = 0, cut: float = 0.0
) -> Shares:
    """Fit every layer on text and write it into `work`; resume if some are there.

    Args:
        model: the dense checkpoint.
        ids: token ids of text, ``[N, T]``.
        work: folder of this conversion; see `finish`.
        neurons: of each new feed-forward, at most twice those of the old.
        passes: over the text in which each is then trained.
        cut: a gate at most this large counts as zero (see `fit`).

    Returns:
        ``[layer][expert]``: see `fit_layer`.

    Raises:
        TurboSparseError: `work` holds a conversion with other settings.
    """
    both = ids.repeat(2, 1)  # through the layers as they become, and through the dense ones
    how: dict[str, Any] = {"neurons": neurons, "passes": passes, "cut": cut}
    steps = Steps(work, model, both, how, "conversion")
    states = steps.hidden()
    for index in steps.left("converting layers"):
        new, share = fit_layer(model, index, states, **how)
        steps.finish(_layer(model, index, new), states, share)
    return steps.about


@torch.no_grad()
def fit_layer(
    model: Layerwise,
    index: int,
    states: Tensor,
    *,
    neurons: int,
    passes: int = 0,
    cut: float = 0.0,
) -> tuple[list[FFN], list[float | None]]:
    """Change the feed-forward of a layer, or those of its experts, and move the states past it.

    What it shall give is what the dense one makes of the same input, and a part of what the states
    lack of those of the dense model: so errors of earlier layers do not add up.

    Args:
        model: the dense checkpoint.
        index: of the layer.
        states: before the layer, ``[2·N, T, H]``: behind the changed layers, then behind the dense
            ones; overwritten by those after it.
        neurons: of each new FFN, at most twice those of the old.
        passes: over the text, in which the new feed-forward is then trained (`reconstruct`).
        cut: a gate at most this large counts as zero (see `fit`).

    Returns:
        The new feed-forwards, one for each expert (one if dense), and of each the share of the
        variance of what it shall give on the held-out text that it accounts for: None where that
        does not vary, as of an expert that no token was sent to.
    """
    shell = model.layer(index)
    model.attend(shell, states)
    hidden, dense = states.chunk(2)
    normed = torch.cat([model.ffn_input(shell, part).cpu() for part in model.chunks(hidden)])
    chosen = model.routed(shell, hidden) if families.experts(model.config) else None
    lack = _lack(model, shell, hidden, dense)
    held_out = torch.arange(len(hidden)) % HELD_OUT == HELD_OUT - 1
    new, shares = [], []
    for number, old in enumerate(weights_of(shell.layers[0].mlp)):
        at = f"layer {index}" if chosen is None else f"layer {index}, expert {number}"
        mine = [~held_out, held_out]
        if chosen is not None:
            sent = (chosen == number).any(-1)
            mine = [sent & part[:, None] for part in mine]
        seen, unseen = (_task(old, normed[part], lack[part], model.device) for part in mine)
        tries = [fit(old, *seen, neurons, cut=cut, where=at)]
        if cut and not len(seen[0]):  # the threshold is for gates of the usual size all the same
            tries = [with_usual_gates(tries[0], normed.flatten(0, 1).to(model.device))]
        if passes and len(seen[0]):
            tries.append(reconstruct(tries[0], *seen, passes, cut))
        judge = unseen if len(unseen[0]) else seen
        found = [(made := ffn.to(old.gate.dtype), explained(made, *judge, cut)) for ffn in tries]
        made, share = max(found, key=lambda each: each[1] or 0.0)
        shares.append(share)
        new.append(made)
    mlp = model.empty_ffn(index, "drelu", cut)
    if chosen is not None:
        mlp.gate = shell.layers[0].mlp.gate
    _put(mlp, new)
    shell.layers[0].mlp = mlp
    model.feed_forward(shell, hidden)
    return new, shares


def _lack(model: Layerwise, shell: Any, hidden: Tensor, dense: Tensor) -> Tensor:
    """What the residuals `hidden` lack of `dense` behind the dense feed-forward, which moves these.

    Nothing where the dense states are massive, as of first tokens: no other would count.
    """
    after = hidden.clone()
    for residual in (after, dense):
        model.feed_forward(shell, residual)
    size = dense.float().square().mean(-1, keepdim=True)
    return after.neg_().add_(dense).mul_(size < _MASSIVE * size.median())


def _task(old: FFN, x: Tensor, lack: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """What a feed-forward reads and shall give, ``[tokens, H]`` each."""
    x, lack = (part.reshape(-1, part.shape[-1]).to(device) for part in (x, lack))
    # the weights of a token's experts add up to 1, so that all of them may give the same
    return x, old.output(x, "swiglu") + _REPAID * lack


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
