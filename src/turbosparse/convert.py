"""Stage 1: a dense SwiGLU model becomes a dReLU model.

Reads a Hugging Face folder (Mistral, Llama, Qwen2, Mixtral), writes another. What changes is the
config and the class that it names (Turbo Sparse §3.2, §5). The weights stay as they are, so shards
are copied file by file and a model of any size converts in little memory; or, with text to look at,
the FFN weights are chosen and fitted on it, which saves much of the recovery (`calibrate`).

    turbosparse convert mistralai/Mistral-7B-v0.1 mistral-drelu
    turbosparse convert mistralai/Mistral-7B-v0.1 mistral-drelu --data books --data web.jsonl
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from turbosparse.base.errors import TurboSparseError
from turbosparse.base.folders import (
    check_free,
    copy_companions,
    new_folder,
    read_config,
    write_json,
)
from turbosparse.hf import families
from turbosparse.hf.activations import Activation
from turbosparse.hf.hub import model_folder


@dataclass(frozen=True)
class Converted:
    """What `convert` wrote."""

    out: str
    model_type: str
    activation: str
    parameters: int
    shards: int
    explained: list[list[float | None]] | None  # [layer][expert], see `calibrate`

    def __str__(self) -> str:
        calibrated = ""
        shares = [share for layer in self.explained or [] for share in layer if share is not None]
        if shares:
            calibrated = f"Calibrated: {min(shares):.0%} to {max(shares):.0%} of FFN outputs kept. "
        return (
            f"{self.out}: {self.model_type}, {self.activation}, "
            f"{self.parameters / 1e6:.2f} M parameters, {self.shards} shard"
            f"{'s' * (self.shards != 1)}. {calibrated}"
            "Quality is lost at first: recover it with `turbosparse train`."
        )


def convert(
    source: str,
    out: Path,
    *,
    activation: Activation = "drelu",
    link: bool = False,
    data: list[Path] | None = None,
    template: str = "{text}",
    separator: str | None = None,
    tokens: int = 65_536,
    widen: float = 1.0,
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
    data
        Text, JSON-lines or .gz file, or a folder of them, like the text that it shall learn again
        from: calibrate on it, so that less is lost. Repeat it for more; each gets an equal share.
        The whole model must fit in memory.
    template
        How a JSON row becomes text, such as "{question} {answer}".
    separator
        Text between the documents of a text file; without it a file is one document.
    tokens
        Calibrate on about so many tokens.
    widen
        Give each FFN so many times its neurons, from 1 to 2: at 2 none of a dense neuron's two
        halves is lost. Needs --data.
    """
    from math import prod

    from turbosparse.hf.checkpoint import INDEX, Checkpoint
    from turbosparse.hf.load import (
        check_activation,
        copy_code,
        hidden_act,
        load_config,
        load_tokenizer,
        quiet,
        sparse_keys,
    )
    from turbosparse.training.readers import documents

    check_activation(activation)
    _check_calibration(activation, link=link, data=data, tokens=tokens, widen=widen)
    check_free(out)
    folder = model_folder(source)
    raw = read_config(folder)
    config = load_config(folder)
    if raw["model_type"].startswith(families.PREFIX):
        raise TurboSparseError(
            f"{folder} is already sparse (ffn_activation {raw.get('ffn_activation', 'drelu')!r}); "
            "convert the dense model it came from"
        )
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise TurboSparseError(
            f"{folder}: hidden_act is {raw['hidden_act']!r}, not 'silu': this is no SwiGLU model; "
            "convert works on dense SwiGLU models"
        )
    checkpoint = Checkpoint(folder)
    checkpoint.check(config)
    load_tokenizer(folder)

    if activation != "swiglu":
        raw |= sparse_keys(raw["model_type"])
        raw |= {"hidden_act": hidden_act(activation), "ffn_activation": activation}
    raw["turbosparse"] = {"converted_from": str(source), "activation": activation}

    explained = None
    with new_folder(out) as work:
        if data:
            corpora = [documents(path, template=template, separator=separator) for path in data]
            model, explained = _calibrated(folder, corpora, tokens, widen)
            with quiet():
                model.save_pretrained(work)
            config.intermediate_size = raw["intermediate_size"] = model.config.intermediate_size
        else:
            for shard in checkpoint.shards:
                _carry(shard, work / shard.name, link=link)
            if (folder / INDEX).is_file():
                shutil.copyfile(folder / INDEX, work / INDEX)
        copy_companions(folder, work)
        if activation != "swiglu":
            copy_code(work)
        write_json(work / "config.json", raw)
    parameters = sum(prod(shape) for shape in families.tensor_shapes(config).values())
    shards = len(list(out.glob("*.safetensors")))
    return Converted(str(out), raw["model_type"], activation, parameters, shards, explained)


def _check_calibration(
    activation: str, *, link: bool, data: list[Path] | None, tokens: int, widen: float
) -> None:
    if not 1 <= widen <= 2:
        raise TurboSparseError(
            f"--widen {widen:g}: a neuron has two halves; give a number from 1 to 2"
        )
    if not data:
        if widen > 1:
            raise TurboSparseError("--widen needs --data: text says which halves to keep")
        return
    if activation != "drelu":
        raise TurboSparseError(
            f"--data calibrates the halves that dReLU keeps; leave it out with {activation}"
        )
    if link:
        raise TurboSparseError("--link keeps the weights, --data changes them: leave one out")
    if tokens < 1:
        raise TurboSparseError(f"--tokens is {tokens}; give at least 1")


def _calibrated(
    folder: Path, corpora: list[Iterator[str]], tokens: int, widen: float
) -> tuple[Any, list[list[float | None]]]:
    import torch

    from turbosparse.hf.load import load_model, load_tokenizer
    from turbosparse.hf.surgery import calibrate
    from turbosparse.training.mixture import packed_sequences

    model, tokenizer = load_model(folder, activation="drelu"), load_tokenizer(folder)
    length = min(tokens, model.config.max_position_embeddings, 1024)
    each = -(-tokens // (length * len(corpora)))
    rows = [
        row["input_ids"]
        for corpus in corpora
        for row in islice(packed_sequences(corpus, tokenizer, length, append_eos=True), each)
    ]
    if not rows:
        raise TurboSparseError(
            f"the text of --data has less than {length} tokens; give more, or fewer --tokens"
        )
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        model.to("cuda" if model.get_memory_footprint() < free / 2 else "cpu")
    neurons = round(widen * model.config.intermediate_size)
    return model, calibrate(model, rows, neurons=neurons)


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
