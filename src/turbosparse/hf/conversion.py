"""A dense checkpoint becomes a calibrated dReLU checkpoint, one layer after the other.

The state of a conversion stands in a folder: a shard for each finished layer, and the hidden states
behind the last of them. A stopped conversion resumes there.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from turbosparse.base.errors import TurboSparseError
from turbosparse.base.folders import new_file, read_config, write_json
from turbosparse.base.progress import note, track
from turbosparse.hf import families
from turbosparse.hf.checkpoint import INDEX
from turbosparse.hf.layerwise import Layerwise
from turbosparse.hf.surgery import FFN, fit_layer

STATE, HIDDEN = "state.json", "hidden.safetensors"
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
    layers = model.config.num_hidden_layers
    work.mkdir(parents=True, exist_ok=True)
    shares = _begin(work, model, ids, neurons)
    hidden = _read_hidden(work) if shares else model.embed(ids)
    held_out = torch.arange(len(ids)) % HELD_OUT == HELD_OUT - 1
    for index in track(range(len(shares), layers), "converting layers", total=layers - len(shares)):
        shell = model.layer(index)
        new, share = fit_layer(
            model, shell, hidden, neurons=neurons, held_out=held_out, where=f"layer {index}"
        )
        del shell
        _save(work / _shard(index), _layer(model, index, new))
        shares.append(share)
        _save(work / HIDDEN, {"hidden": hidden}, {"shares": json.dumps(shares)})
    return shares


def finish(model: Layerwise, work: Path, out: Path) -> None:
    """Move the shards into the model folder `out`; add what is not in a layer, and the index."""
    layers = model.config.num_hidden_layers
    outside = [t.name for t in families.tensors(model.config) if t.layer is None]
    _save(work / _shard(layers), {name: model.checkpoint[name] for name in outside})
    home: dict[str, str] = {}
    total = 0
    for number in range(layers + 1):
        name = f"model-{number + 1:05}-of-{layers + 1:05}.safetensors"
        with safe_open(work / _shard(number), framework="pt") as shard:
            home |= dict.fromkeys(shard.keys(), name)
        total += (work / _shard(number)).stat().st_size
        (work / _shard(number)).rename(out / name)
    write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": home})


def _begin(work: Path, model: Layerwise, ids: Tensor, neurons: int) -> Shares:
    """The shares of the layers that are finished; of a new conversion none."""
    request = {
        "source": str(model.checkpoint.folder.resolve()),
        "text": hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
        "neurons": neurons,
        "dtype": str(model.dtype),
    }
    if not (work / STATE).is_file():
        with new_file(work / STATE) as file:
            write_json(file, request)
        return []
    state = read_config(work, STATE)
    if changed := [key for key in request if request[key] != state.get(key)]:
        raise TurboSparseError(
            f"{work} holds a stopped conversion with other settings ({', '.join(changed)}); "
            "remove it to start again, or give the old settings to resume"
        )
    if not (work / HIDDEN).is_file():
        return []
    with safe_open(work / HIDDEN, framework="pt") as file:
        shares: Shares = json.loads(file.metadata()["shares"])
    note(f"resuming after layer {len(shares) - 1}")
    return shares


def _read_hidden(work: Path) -> Tensor:
    with safe_open(work / HIDDEN, framework="pt") as file:
        hidden: Tensor = file.get_tensor("hidden").clone()
    return hidden


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


def _save(path: Path, tensors: dict[str, Tensor], about: dict[str, str] | None = None) -> None:
    with new_file(path) as work:
        save_file(tensors, work, metadata={"format": "pt", **(about or {})})


def _shard(index: int) -> str:
    return f"layer-{index:05}.safetensors"
