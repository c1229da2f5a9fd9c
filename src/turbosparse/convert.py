"""Stage 1: a dense SwiGLU model becomes a dReLU model; a published sparse model becomes ours.

Reads a Hugging Face folder (Mistral, Llama, Qwen2, Mixtral), writes another. What changes is the
config and the class that it names (Turbo Sparse §3.2, §5). The weights stay as they are, so shards
are copied file by file and a model of any size converts in little memory; or, with text to look at,
the FFN weights of a dense model are chosen and fitted on it, which saves much of the recovery
(`calibrate`).

    turbosparse convert mistralai/Mistral-7B-v0.1 mistral-drelu
    turbosparse convert mistralai/Mistral-7B-v0.1 mistral-drelu --data books --data web.jsonl
    turbosparse convert Tiiny/TurboSparse-Mistral-Instruct turbosparse-mistral
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

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
from turbosparse.base.machine import Device
from turbosparse.hf import families
from turbosparse.hf.activations import Activation, stock
from turbosparse.hf.hub import model_folder
from turbosparse.hf.published import mend_generation, own_fields, record_of, with_cache
from turbosparse.training.sample import draw


@dataclass(frozen=True)
class Converted:
    """What `convert` wrote."""

    out: str
    model_type: str
    activation: str
    parameters: int
    shards: int
    explained: list[list[float | None]] | None  # [layer][expert], see `calibrate`
    was: str  # the activation of the source

    def __str__(self) -> str:
        what = (
            f"{self.out}: {self.model_type}, {self.activation}, "
            f"{self.parameters / 1e6:.2f} M parameters, {self.shards} shard"
            f"{'s' * (self.shards != 1)}. "
        )
        if self.was == self.activation:
            return f"{what}It computes what it computed before."
        calibrated = ""
        shares = [share for layer in self.explained or [] for share in layer if share is not None]
        if shares:
            calibrated = (
                f"Calibrated: {min(shares):.0%} to {max(shares):.0%} of the variance of the "
                "feed-forwards is kept, measured on text that the fit did not see. "
            )
        return (
            f"{what}{calibrated}Quality is lost at first: recover it with `turbosparse train`. "
            "Small models needed two training tokens per parameter. A model that was trained long "
            "needs more, and a chat model needs conversations among them. Measured on "
            "SmolLM2-135M: 1.7 × the dense model's perplexity with 64 % zeros after "
            "--reconstruct 4; 1.9 × with 80 % when --gate-threshold 0.3 is given too; from there "
            "1.6 × after 0.46 M tokens with it as the teacher (docs/quality.md)."
        )


def convert(
    source: str,
    out: AnyPath,
    *,
    activation: Activation | None = None,
    predictor: str | None = None,
    link: bool = False,
    data: Sequence[AnyPath] | None = None,
    template: str = "{text}",
    separator: str | None = None,
    tokens: int = 65_536,
    widen: float = 1.0,
    reconstruct: int = 0,
    gate_threshold: float = 0.0,
    device: Device = "auto",
) -> Converted:
    """Replace the SwiGLU feed-forward of a dense model by dReLU.

    A sparse model that others published (TurboSparse, Bamboo, SparseQwen2, ProSparse, ReluLLaMA,
    SparseLM) becomes a folder of ours that computes the same, with the predictor that it has. A
    model of a family that is made sparse (AFM, Nemotron) is copied: pack takes it as it is.

    Parameters
    ----------
    source
        Model folder, or hub id such as mistralai/Mistral-7B-v0.1.
    out
        New model folder.
    activation
        Of a dense model: drelu, the default, is the paper's; geglu, reglu, relu and relu2 are for
        comparisons; swiglu copies the dense model as it is. Of a sparse model: what its weights
        were trained with, where neither config.json nor the name of the model tells.
    predictor
        Folder or hub id that holds model_0.pt, model_1.pt, …, the predictor of a published sparse
        model, to merge into the new folder.
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
    reconstruct
        Then train each feed-forward alone, towards the dense one's output, in this many passes over
        the text. Gate, up and down learn; what does not help on the text kept apart is dropped.
    gate_threshold
        Count a gate as zero up to this share of the mean of the positive ones of its layer
        (FATReLU), in the fit and ever after: more zeros at little loss. Needs --data.
    device
        Where the layers run: auto takes a GPU if there is one.
    """
    from math import prod

    import torch

    from turbosparse.hf.checkpoint import INDEX, PREDICTOR, Checkpoint, add_shard
    from turbosparse.hf.conversion import convert_layers, finish
    from turbosparse.hf.layerwise import Layerwise
    from turbosparse.hf.load import (
        activation_keys,
        activation_of,
        check_activation,
        copy_code,
        load_tokenizer,
        threshold_of,
    )
    from turbosparse.hf.powerinfer import read_predictor

    out, texts = local_path(out), [local_path(path) for path in data or ()]
    wanted: str = activation or "drelu"
    check_activation(wanted)
    _check_calibration(
        wanted,
        link=link,
        data=texts,
        tokens=tokens,
        widen=widen,
        passes=reconstruct,
        cut=gate_threshold,
    )
    check_free(out)
    folder = model_folder(source)
    config = _source_config(folder, activation)
    if (was := activation_of(config)) != "swiglu":
        wanted = was
    if (was != "swiglu" and texts) or (was == "swiglu" and predictor):
        raise TurboSparseError(
            f"{folder} is a {was} model: --data fits a dense one, --predictor is for a sparse one"
        )
    checkpoint = Checkpoint(folder)
    checkpoint.check(config)
    tokenizer = load_tokenizer(folder)
    raw = with_cache(own_fields(folder, tokenizer))
    if wanted != "swiglu":
        cut = gate_threshold or threshold_of(config)
        raw |= activation_keys(raw["model_type"], wanted, cut)
    merged = None
    if predictor:
        merged, raw["predictor"] = read_predictor(predictor, config)
        checkpoint.merge(predictor, merged)  # raises if there is one
        checkpoint.predictor_ranks(config)  # raises if it is of another model
    raw["turbosparse"] = {"converted_from": str(source), "activation": wanted}

    explained = None
    if texts:
        length = min(tokens, config.max_position_embeddings, 1024)
        how: dict[str, Any] = {"template": template, "separator": separator}
        how |= {"tokens": tokens, "length": length}
        ids = draw(texts, tokenizer, config.vocab_size, **how)
        model = Layerwise(folder, device=device)
        neurons = _wider(config.intermediate_size, widen)
        state = out.with_name(out.name + ".converting")
        with named_disk_errors(state):
            explained = convert_layers(
                model,
                torch.tensor(ids),
                state,
                neurons=neurons,
                passes=reconstruct,
                cut=gate_threshold,
            )
    with new_folder(out) as work:
        if texts:
            finish(model, state, work)
            config.intermediate_size = raw["intermediate_size"] = neurons
        else:
            for shard in checkpoint.shards:
                _carry(shard, work / shard.name, link=link)
            if (folder / INDEX).is_file():
                shutil.copyfile(folder / INDEX, work / INDEX)
        if merged:
            add_shard(work, PREDICTOR, merged)
        copy_companions(folder, work)
        mend_generation(work, raw)
        if raw["model_type"].startswith(families.PREFIX):
            copy_code(work)
        write_json(work / "config.json", raw)
    if texts:
        shutil.rmtree(state, ignore_errors=True)
    parameters = sum(prod(shape) for shape in families.tensor_shapes(config).values())
    shards = len(list(out.glob("*.safetensors")))
    return Converted(str(out), raw["model_type"], wanted, parameters, shards, explained, was)


def _source_config(folder: Path, asked: Activation | None) -> Any:
    """The config of the source, with the activation that its weights were trained with.

    Raises:
        TurboSparseError: it is ours already, or sparse with another activation than asked for.
    """
    from turbosparse.hf.load import activation_of, load_config

    raw = read_config(folder)
    if str(raw.get("model_type")).startswith(families.PREFIX):
        raise TurboSparseError(
            f"{folder} is already sparse (ffn_activation {raw.get('ffn_activation', 'drelu')!r}); "
            "convert the dense model it came from"
        )
    known = stock(str(raw.get("model_type")))
    unnamed = not record_of(folder) and known.get(str(raw.get("hidden_act")), "") is None
    config = load_config(folder, asked if unnamed else None)
    was = activation_of(config)
    fits = was in ("reglu", "drelu") if unnamed else was == "swiglu" or asked in (None, was)
    if not fits:
        raise TurboSparseError(
            f"{folder} is not a dense SwiGLU model, but {'one with relu' if unnamed else was}: "
            f"--activation {asked} would make another function of its weights"
        )
    return config


def _check_calibration(
    activation: str,
    *,
    link: bool,
    data: list[Path],
    tokens: int,
    widen: float,
    passes: int,
    cut: float,
) -> None:
    if not 1 <= widen <= 2:
        raise TurboSparseError(
            f"--widen {widen:g}: a neuron has two halves; give a number from 1 to 2"
        )
    if passes < 0:
        raise TurboSparseError(f"--reconstruct is {passes}; give 0 or more")
    if not 0 <= cut < inf:
        raise TurboSparseError(f"--gate-threshold is {cut}; give 0 or more, such as 0.5")
    if not data:
        given = {"--widen": widen > 1, "--reconstruct": passes, "--gate-threshold": cut}
        if which := [option for option, value in given.items() if value]:
            raise TurboSparseError(f"{which[0]} needs --data: text says what the neurons do")
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
