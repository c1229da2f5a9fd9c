"""Predictors that PowerInfer's models are published with: a folder of ``model_<layer>.pt``.

A file is the state dict of two matrices, ``fc1.weight`` [R, H] and ``fc2.weight`` [I, R]. The
predictor reads the residual before the norm, and a logit that equals the threshold is a candidate.
"""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from turbosparse.base.errors import TurboSparseError
from turbosparse.base.folders import read_config, refuse_pointer
from turbosparse.hf import families
from turbosparse.hf.hub import some_files


def read_predictor(source: str, config: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The matrices by the names that they have when merged, mapped rather than read.

    Args:
        source: folder or hub id.
        config: of the model.

    Returns:
        The tensors, and what the block ``"predictor"`` of config.json says of them.

    Raises:
        TurboSparseError: a file is missing, damaged, or of another form or number of layers.
    """
    if families.experts(config):
        raise TurboSparseError(f"{source}: such predictors are for dense models, not for experts")
    files = ["config.json", "model_*.pt"]
    folder = some_files(source, files, what="a folder of predictors (model_0.pt, …)")
    layers = range(config.num_hidden_layers)
    found = {path.name for path in folder.glob("model_*.pt")}
    if wrong := sorted(found ^ {f"model_{layer}.pt" for layer in layers}):
        raise TurboSparseError(
            f"{folder}: {wrong[0]} is {'not of this model' if wrong[0] in found else 'missing'}; "
            f"a model of {len(layers)} layers has predictors model_0.pt to model_{layers[-1]}.pt"
        )
    name = families.table(config).name
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        fc1, fc2 = _matrices(folder / f"model_{layer}.pt")
        tensors |= {name("fc1", layer): fc1, name("fc2", layer): fc2}
    return tensors, {"input": "pre_norm", "threshold": _threshold(folder)}


def _matrices(path: Path) -> tuple[Tensor, Tensor]:
    refuse_pointer(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise TurboSparseError(
            f"{path} cannot be read as torch tensors ({str(error).splitlines()[0]}); "
            "download it again"
        ) from error
    names = ["fc1.weight", "fc2.weight"]
    if not isinstance(state, dict) or sorted(map(str, state)) != names:
        held = ", ".join(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise TurboSparseError(f"{path} holds {held:.80}, not {' and '.join(names)}")
    fc1, fc2 = (state[key] for key in names)
    if not all(isinstance(part, Tensor) and part.is_floating_point() for part in (fc1, fc2)):
        raise TurboSparseError(f"{path}: {' and '.join(names)} are not floating point matrices")
    return fc1, fc2


def _threshold(folder: Path) -> float:
    """Of the logits, 0 unless the folder's config.json says otherwise."""
    config = read_config(folder) if (folder / "config.json").is_file() else {}
    found = config.get("sparse_threshold", 0)
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not math.isfinite(found):
        raise TurboSparseError(
            f"{folder / 'config.json'}: sparse_threshold is {found!r:.80}, not a finite number"
        )
    return float(found)
