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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from turbosparse.base.errors import TurboSparseError
from turbosparse.base.folders import (
    AnyPath,
    check_free,
    copy_companions,
    local_path,
    named_disk_errors,
    new_folder,
    read_config,
    write_json,
)
from turbosparse.hf import families
from turbosparse.hf.activations import Activation
from turbosparse.hf.hub import model_folder
from turbosparse.training.mixture import packed_sequences
from turbosparse.training.readers import document_streams

STREAMS = 64  # that a folder's files are read in, in turn


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
            calibrated = (
                f"Calibrated: {min(shares):.0%} to {max(shares):.0%} of the variance of the "
                "feed-forwards is kept, measured on text that the fit did not see. "
            )
        return (
            f"{self.out}: {self.model_type}, {self.activation}, "
            f"{self.parameters / 1e6:.2f} M parameters, {self.shards} shard"
            f"{'s' * (self.shards != 1)}. {calibrated}"
            "Quality is lost at first: recover it with `turbosparse train`. Small models needed "
            "two training tokens per parameter (docs/quality.md). A model that was trained long "
            "needs more, and a chat model needs fine-tuning on conversations afterwards."
        )


def convert(
    source: str,
    out: AnyPath,
    *,
    activation: Activation = "drelu",
    link: bool = False,
    data: Sequence[AnyPath] | None = None,
    template: str = "{text}",
    separator: str | None = None,
    tokens: int = 65_536,
    widen: float = 1.0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
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
        Text, JSON-lines or .gz file, or a folder of them, like the text of the recovery:
        the feed-forwards are fitted to the dense ones on it, so that less is lost. Repeat it for
        more; each gets an equal share, and so do the files of a folder.
        One layer of the model is in memory at a time. A stopped conversion resumes from
        OUT.converting when the same command is given again.
    template
        How a JSON row becomes text, such as "{question} {answer}".
    separator
        Text between the documents of a text file; without it a file is one document.
    tokens
        Fit on about this many tokens; an eighth of them is kept apart to measure the fit.
    widen
        Multiply the neurons of each FFN by this, from 1 to 2: at 2 none of a dense neuron's two
        halves is lost. A multiple of 64 stays one: it is rounded up. Needs --data.
    device
        Where the layers run: auto takes a GPU if there is one.
    """
    from math import prod

    import torch

    from turbosparse.hf.checkpoint import INDEX, Checkpoint
    from turbosparse.hf.conversion import convert_layers, finish
    from turbosparse.hf.layerwise import Layerwise
    from turbosparse.hf.load import (
        activation_keys,
        check_activation,
        copy_code,
        load_config,
        load_tokenizer,
    )

    out, texts = local_path(out), [local_path(path) for path in data or ()]
    check_activation(activation)
    _check_calibration(activation, link=link, data=texts, tokens=tokens, widen=widen)
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
    tokenizer = load_tokenizer(folder)

    if activation != "swiglu":
        raw |= activation_keys(raw["model_type"], activation)
    raw["turbosparse"] = {"converted_from": str(source), "activation": activation}

    explained = None
    if texts:
        length = min(tokens, config.max_position_embeddings, 1024)
        how: dict[str, Any] = {"template": template, "separator": separator}
        how |= {"tokens": tokens, "length": length}
        ids = _draw(texts, tokenizer, config.vocab_size, **how)
        model = Layerwise(folder, activation="drelu", device=device)
        neurons = _wider(config.intermediate_size, widen)
        state = out.with_name(out.name + ".converting")
        with named_disk_errors(state):
            explained = convert_layers(model, torch.tensor(ids), state, neurons=neurons)
    with new_folder(out) as work:
        if texts:
            finish(model, state, work)
            config.intermediate_size = raw["intermediate_size"] = neurons
        else:
            for shard in checkpoint.shards:
                _carry(shard, work / shard.name, link=link)
            if (folder / INDEX).is_file():
                shutil.copyfile(folder / INDEX, work / INDEX)
        copy_companions(folder, work)
        if activation != "swiglu":
            copy_code(work)
        write_json(work / "config.json", raw)
    if texts:
        shutil.rmtree(state, ignore_errors=True)
    parameters = sum(prod(shape) for shape in families.tensor_shapes(config).values())
    shards = len(list(out.glob("*.safetensors")))
    return Converted(str(out), raw["model_type"], activation, parameters, shards, explained)


def _check_calibration(
    activation: str, *, link: bool, data: list[Path], tokens: int, widen: float
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


def _wider(neurons: int, widen: float) -> int:
    """So many times the neurons; sizes of real models stay multiples of 64, for their kernels."""
    wide = round(widen * neurons)
    return min(-(-wide // 64) * 64, 2 * neurons) if neurons % 64 == 0 else wide


def _draw(
    data: list[Path], tokenizer: Any, vocabulary: int, *, tokens: int, length: int, **how: Any
) -> list[list[int]]:
    """Token ids of about this many tokens: as much of each of `data`, and in it of each file."""
    from turbosparse.hf.load import check_ids

    each = -(-tokens // (length * len(data)))
    rows: list[list[int]] = []
    for path in data:
        streams = [
            packed_sequences(documents, tokenizer, length, append_eos=True)
            for documents in document_streams(path, STREAMS, **how)
        ]
        drawn = islice(_in_turn(streams), each)
        rows += [check_ids(row["input_ids"], tokenizer, vocabulary) for row in drawn]
    if not rows:
        raise TurboSparseError(
            f"the text of --data has fewer than {length} tokens; give more text, or fewer --tokens"
        )
    return rows


def _in_turn(streams: list[Iterator[Any]]) -> Iterator[Any]:
    while streams:
        for stream in list(streams):
            try:
                yield next(stream)
            except StopIteration:
                streams.remove(stream)


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
