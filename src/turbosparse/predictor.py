"""Predictors: which neurons a token needs, found before their rows are read.

`train` makes one for each feed-forward of a sparse model folder, and writes them merged into a
copy of it, which convert, export and pack take as it is. `turbosparse.score` measures what they
cost and sets their thresholds.

    turbosparse predictor train mistral-sparse mistral-predicted --data books --data web.jsonl
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file

from turbosparse.base.errors import TurboSparseError
from turbosparse.base.folders import (
    AnyPath,
    check_free,
    copy_companions,
    local_path,
    named_disk_errors,
    new_folder,
    write_json,
)
from turbosparse.base.machine import Device
from turbosparse.hf import families
from turbosparse.hf.activations import WITHOUT_ZEROS
from turbosparse.hf.checkpoint import PREDICTOR, add_shard, copy_weights
from turbosparse.hf.hub import model_folder
from turbosparse.hf.layerwise import Layerwise
from turbosparse.hf.load import activation_keys, activation_of, copy_code, threshold_of
from turbosparse.hf.published import own_fields
from turbosparse.hf.steps import shard_name
from turbosparse.predictors.make import HELD_OUT, How, make_layers, rank_of
from turbosparse.predictors.mask import find_predictor
from turbosparse.predictors.measure import Recall
from turbosparse.training.sample import sequences


@dataclass(frozen=True)
class Trained:
    """What `train` wrote; shares are means over the layers, on text kept apart."""

    out: str
    kind: str
    rank: int | None
    recall: float
    norm_recall: float
    density: float
    active: float

    def __str__(self) -> str:
        rank = f" of rank {self.rank}" if self.rank else ""
        return (
            f"{self.out}: {self.kind} predictors{rank}; norm recall {self.norm_recall:.2%}, recall "
            f"{self.recall:.2%}, {self.density:.1%} of the neurons are candidates where "
            f"{self.active:.1%} are active. What that costs in quality says "
            "`turbosparse predictor score`."
        )


def train(
    model: str,
    out: AnyPath,
    *,
    data: Sequence[AnyPath],
    kind: Literal["lowrank", "svd", "sign"] = "lowrank",
    reads: Literal["post_norm", "pre_norm"] = "post_norm",
    replace: bool = False,
    share: float = 0.11,
    carry: float = 0.99,
    recall: float = 0.995,
    epochs: int = 5,
    tokens: int = 300_000,
    seed: int = 0,
    template: str = "{text}",
    separator: str | None = None,
    device: Device = "auto",
) -> Trained:
    """Make predictors for a sparse model, and write a copy of the model that holds them.

    Parameters
    ----------
    model
        Sparse model folder or hub id.
    out
        New model folder. A stopped run resumes from OUT.predicting when the same command is given
        again.
    data
        Text, JSON-lines or .gz file, or a folder of them, like the text that the model will see.
        Repeat it for more; each gets an equal share.
    kind
        lowrank trains two matrices for each feed-forward. svd takes them from a singular value
        decomposition of the weights. sign compares the signs of weights and inputs, and adds no
        weights. The last two need no training, but text for the threshold.
    reads
        What a predictor reads: what the feed-forward reads, or the residual before its norm, as
        PowerInfer has it.
    replace
        Leave out the predictor that the model holds; without it such a model is refused.
    share
        Weights of a predictor, as a share of those of its feed-forward, at most.
    carry
        Train to find the neurons that carry this share of a token's output; 1: all active ones.
    recall
        Share of the output, by squares, that the candidates of each layer add: the threshold is
        chosen so. `score` chooses another.
    epochs
        Passes over the tokens.
    tokens
        Make them on about this many tokens; an eighth is kept apart for the thresholds. Far fewer
        give bad predictors of low_rank.
    seed
        Of the order of the tokens. The same seed gives the same predictors.
    template
        How a JSON row becomes text, such as "{question} {answer}".
    separator
        Text between the documents of a text file; without it a file is one document.
    device
        Where the layers run: auto takes a GPU if there is one.
    """
    out, texts = local_path(out), [local_path(path) for path in data]
    for flag, value in {"share": share, "carry": carry, "recall": recall}.items():
        if not 0 < value <= 1:
            raise TurboSparseError(f"--{flag} {value:g}: give more than 0 and at most 1")
    if tokens < 1 or epochs < 1:
        raise TurboSparseError(f"--tokens {tokens}, --epochs {epochs}: give at least 1 of each")
    check_free(out)
    folder = model_folder(model)
    layers = Layerwise(folder, device=device)
    _check_model(layers, kind, reads, replace)
    rank = None if kind == "sign" else rank_of(layers.config, share)
    ids = sequences(folder, layers.config, texts, tokens, template, separator)
    if len(ids) < HELD_OUT:
        raise TurboSparseError(
            f"--tokens {tokens} are {len(ids)} sequences of {ids.shape[1]}; give at least "
            f"{HELD_OUT * ids.shape[1]}, for every eighth is kept apart"
        )
    how = How(kind, reads, rank, carry, recall, epochs, seed)
    state = out.with_name(out.name + ".predicting")
    with named_disk_errors(state):
        about = make_layers(layers, ids, state, how)
    block = {
        "kind": "low_rank" if rank else "sign",
        "input": reads,
        "threshold": [[one["threshold"] for one in layer] for layer in about],
    }
    total = reduce(Recall.plus, (Recall(*one["recall"]) for layer in about for one in layer))
    neurons = layers.config.intermediate_size
    _write(layers, state, len(about), block | total.shares(neurons), out)
    shutil.rmtree(state, ignore_errors=True)
    return Trained(str(out), kind, rank, active=total.share(neurons), **total.shares(neurons))


def _check_model(layers: Layerwise, kind: str, reads: str, replace: bool) -> None:
    folder, activation = layers.checkpoint.folder, activation_of(layers.config)
    if activation in WITHOUT_ZEROS:
        raise TurboSparseError(f"{folder} is a {activation} model: it has no zeros to predict")
    if kind == "sign" and reads != "post_norm":
        raise TurboSparseError("--reads pre_norm: sign reads what the feed-forward reads")
    if not replace and find_predictor(layers.config, layers.checkpoint):
        raise TurboSparseError(
            f"{folder} holds a predictor already; give --replace to leave it out of the new folder"
        )


def _write(layers: Layerwise, state: Path, count: int, block: dict[str, Any], out: Path) -> None:
    """A copy of the model folder with what the pass left in `state`."""
    folder, config = layers.checkpoint.folder, layers.config
    shards = [load_file(state / shard_name(index)) for index in range(count)]
    with new_folder(out) as work:
        copy_weights(layers.checkpoint, work)
        if merged := {name: tensor for shard in shards for name, tensor in shard.items()}:
            add_shard(work, PREDICTOR, merged)
        copy_companions(folder, work)
        if config.model_type.startswith(families.PREFIX):
            copy_code(work)
        fields = activation_keys(config.model_type, activation_of(config), threshold_of(config))
        write_json(work / "config.json", own_fields(folder) | fields | {"predictor": block})
