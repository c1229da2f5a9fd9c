"""Stage 1: a dense SwiGLU model becomes a dReLU model.

Reads a Hugging Face folder (Mistral, Llama, Qwen2, Mixtral), writes another. The weights stay as
they are, so shards are copied file by file and a model of any size converts in little memory; what
changes is the config and the class that it names (Turbo Sparse §3.2, §5).

    turbosparse convert mistralai/Mistral-7B-v0.1 mistral-drelu
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from turbosparse.folders import (
    TurboSparseError,
    check_free,
    copy_companions,
    model_folder,
    new_folder,
    read_config,
    write_json,
)
from turbosparse.hf import names

Activation = Literal["drelu", "geglu", "reglu", "relu", "swiglu"]


@dataclass(frozen=True)
class Converted:
    """What `convert` wrote."""

    out: str
    model_type: str
    activation: str
    parameters: int
    shards: int

    def __str__(self) -> str:
        return (
            f"{self.out}: {self.model_type}, {self.activation}, "
            f"{self.parameters / 1e6:.2f} M parameters, {self.shards} shard"
            f"{'s' * (self.shards != 1)}. "
            "Quality is lost at first: recover it with `turbosparse train`."
        )


def convert(
    source: str, out: Path, *, activation: Activation = "drelu", link: bool = False
) -> Converted:
    """Replace the SwiGLU feed-forward of a dense model by dReLU.

    Parameters
    ----------
    source
        Model folder, or hub id such as mistralai/Mistral-7B-v0.1.
    out
        New model folder.
    activation
        drelu is the paper's. geglu, reglu and relu are for comparisons; swiglu copies the dense
        model as it is.
    link
        Hard-link the weight files instead of copying them. Saves the space, but then a program that
        rewrites one of the two in place changes both.
    """
    from math import prod

    from turbosparse.hf.checkpoint import INDEX, Checkpoint
    from turbosparse.hf.load import (
        check_activation,
        check_supported,
        copy_code,
        hidden_act,
        load_config,
        sparse_keys,
    )

    check_activation(activation)
    check_free(out)
    folder = model_folder(source)
    raw = read_config(folder)
    base = check_supported(raw, folder)
    if raw["model_type"].startswith(names.PREFIX):
        raise TurboSparseError(
            f"{folder} is already sparse (ffn_activation {raw.get('ffn_activation', 'drelu')!r}); "
            "convert the dense model it came from"
        )
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise TurboSparseError(
            f"{folder}: hidden_act is {raw['hidden_act']!r}, not 'silu': this is no SwiGLU model; "
            "convert works on dense SwiGLU models"
        )
    config = load_config(folder)
    checkpoint = Checkpoint(folder)
    checkpoint.check(config)

    if activation != "swiglu":
        raw |= sparse_keys(base)
        raw |= {"hidden_act": hidden_act(activation), "ffn_activation": activation}
    raw["turbosparse"] = {"converted_from": str(source), "activation": activation}

    with new_folder(out) as work:
        for shard in checkpoint.shards:
            _carry(shard, work / shard.name, link=link)
        if (folder / INDEX).is_file():
            shutil.copyfile(folder / INDEX, work / INDEX)
        copy_companions(folder, work)
        if activation != "swiglu":
            copy_code(work)
        write_json(work / "config.json", raw)
    parameters = sum(prod(shape) for shape in names.tensor_shapes(config).values())
    return Converted(str(out), raw["model_type"], activation, parameters, len(checkpoint.shards))


def _carry(shard: Path, target: Path, *, link: bool) -> None:
    if link:
        try:
            os.link(shard.resolve(), target)
            return
        except OSError as error:
            raise TurboSparseError(
                f"cannot hard-link {shard} to {target.parent} ({error.strerror}): "
                "both must be on one disk; leave out --link to copy"
            ) from error
    shutil.copyfile(shard, target)
