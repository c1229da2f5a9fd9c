"""Sparse models as others publish them: what their config.json means in our keys. Loads no torch.

Their tensors, and those of a merged predictor, have the names of our own folders, so a record is
all that such a model needs. The code that comes with it is never run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from turbosparse.base.errors import TurboSparseError
from turbosparse.base.folders import read_config, write_json
from turbosparse.hf.activations import Activation
from turbosparse.hf.families import GATED, PREFIX

# Their files take a neuron whose sigmoid rounds to 1: its logit is above 0. Our rule is "at least
# the threshold", and no logit lies between 0 and the smallest normal float32.
ABOVE_ZERO = 2.0**-126
FAT = "fatrelu"
GENERATION = "generation_config.json"
_SAMPLING = ("temperature", "do_sample", "top_k", "top_p", "min_p")
_ONLY_RELU: Mapping[str, tuple[Any, ...]] = MappingProxyType({"hidden_act": ("relu",)})


class Published(NamedTuple):
    """A ``model_type`` of others.

    `says` are the keys whose other values would mean a function that we do not compute; None among
    the values is for a key that is not there.
    """

    family: str
    activation: Activation
    says: Mapping[str, tuple[Any, ...]]
    predictor_input: str | None = None  # None: it never has one merged


PUBLISHED = {
    # TurboSparse-Mistral and Bamboo: the predictor reads the residual before the norm
    "bamboo": Published("mistral", "drelu", _ONLY_RELU, "pre_norm"),
    # TurboSparse-Mixtral: it reads what the expert reads
    "turbosparsemixtral": Published("mixtral", "drelu", _ONLY_RELU, "post_norm"),
    # ProSparse
    "sparsellama": Published("llama", "reglu", {"hidden_act": (FAT, "relu")}),
    # SparseLM: ``hidden_act`` is left over from its base
    "llama_sparse_relu": Published(
        "llama",
        "reglu",
        {"sparsity_gated_mlp": (True, None), "rope_interleaved": (False, None)},
    ),
}


# Stock classes with weights of another function, which the name of the model tells alone: that of
# its folder or repository, or the heading of its card.
_STOCK = {"hidden_act": ("relu", "silu")}
NAMED = {"sparseqwen2-7b": Published("qwen2", "drelu", _STOCK)} | {
    f"relullama-{size}": Published("llama", "reglu", _STOCK) for size in ("7b", "13b", "70b")
}
_NAME = re.compile(rf"(?<![\w-])(?:{'|'.join(NAMED)})(?![\w-])", re.IGNORECASE)


def record_of(folder: Path) -> Published | None:
    """What a model folder is of; None if it is no published sparse model or does not say so."""
    raw = read_config(folder)
    kind = str(raw.get("model_type"))
    if raw.get("hidden_act") == FAT and kind in GATED:  # ProSparse in the form of a stock class
        return Published(kind, "reglu", {})
    if kind in GATED:
        found = _NAME.search(" ".join(_titles(folder)))
        named = NAMED[found[0].lower()] if found else None
        return named if named and named.family == kind else None
    return PUBLISHED.get(kind)


def _titles(folder: Path) -> Iterator[str]:
    """The names that a model goes by."""
    yield folder.resolve().name
    yield folder.parent.parent.name.rpartition("--")[2]  # a snapshot in the cache of the hub
    card = folder / "README.md"
    lines = card.read_text("utf-8", "replace").splitlines() if card.is_file() else ()
    yield next((line for line in lines if line.startswith("# ")), "")


def own_fields(folder: Path, tokenizer: Any = None) -> dict[str, Any]:
    """The config.json of a published sparse model in our keys; any other as it is.

    Args:
        folder: of the model.
        tokenizer: of the model; what ends a text for it is then added to ``eos_token_id``, for a
            chat model's config.json names only the end token of its base.

    Raises:
        TurboSparseError: names a key that means a function that we do not compute.
    """
    raw = read_config(folder)
    if not (record := record_of(folder)):
        return raw
    where, kind = folder / "config.json", raw["model_type"]
    for key, values in record.says.items():
        if raw.get(key) not in values:
            raise TurboSparseError(
                f"{where}: {key} is {raw.get(key)!r:.80}; of a {kind} model only {values[0]!r} is "
                "supported"
            )
    fields = {key: raw[key] for key in raw if key not in ("auto_map", "hidden_act_param")}
    fields |= {"model_type": PREFIX + record.family, "hidden_act": "relu"}
    fields |= {"ffn_activation": record.activation}
    if raw.get("hidden_act") == FAT:
        if not isinstance(raw.get("hidden_act_param"), (int, float)):
            raise TurboSparseError(
                f"{where}: hidden_act {FAT} needs its threshold as hidden_act_param, not "
                f"{raw.get('hidden_act_param')!r:.80}"
            )
        fields["ffn_threshold"] = raw["hidden_act_param"]
    if record.predictor_input and "predictor" not in raw:  # `predictor score` writes one
        fields["predictor"] = {"input": record.predictor_input, "threshold": ABOVE_ZERO}
    if tokenizer is not None:
        fields["eos_token_id"] = end_tokens(raw.get("eos_token_id"), tokenizer.eos_token_id)
    return fields


def end_tokens(*given: Any) -> int | list[int] | None:
    """All tokens that several ``eos_token_id`` name, in their form: a number, a list or None."""
    every = [token for eos in given for token in (eos if isinstance(eos, list) else [eos])]
    if any(type(token) is not int for token in every if token is not None):
        raise TurboSparseError(f"eos_token_id is {given!r:.80}, not whole numbers or lists of them")
    found = sorted({token for token in every if token is not None})
    return found if len(found) > 1 else next(iter(found), None)


def with_cache(fields: dict[str, Any]) -> dict[str, Any]:
    """Without what a training run leaves behind: generating without a cache is quadratic."""
    return {key: value for key, value in fields.items() if (key, value) != ("use_cache", False)}


def mend_generation(folder: Path, raw: dict[str, Any]) -> None:
    """Make generation_config.json one that transformers can follow, and name all end tokens."""
    if not (folder / GENERATION).is_file():
        return
    given = read_config(folder, GENERATION)
    mended = with_cache(given)
    if not given.get("temperature", 1):  # greedy is meant, but transformers refuses the zero
        mended = {key: value for key, value in mended.items() if key not in _SAMPLING}
    if ends := end_tokens(given.get("eos_token_id"), raw.get("eos_token_id")):
        mended["eos_token_id"] = ends
    if mended != given:
        write_json(folder / GENERATION, mended)
