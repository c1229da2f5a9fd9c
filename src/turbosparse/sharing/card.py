"""A model card, made of what lies in a model folder; what was not measured is not in it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from turbosparse import __version__
from turbosparse.base.errors import TurboSparseError
from turbosparse.base.folders import new_file, read_config
from turbosparse.base.progress import note
from turbosparse.hf import families
from turbosparse.hf.activations import ACTIVATIONS
from turbosparse.hf.config import ModelConfig, read_model_config
from turbosparse.hf.count import RULE, count_parameters
from turbosparse.hf.hub import is_hub_id
from turbosparse.hf.load import activation_of
from turbosparse.packed.format import Packed, is_packed
from turbosparse.packed.header import Profile
from turbosparse.packed.stats import Stats
from turbosparse.training.recipe import Recipe, parse_recipe

CARD, CHART, RECIPE, LOG = "README.md", "sparsity.png", "recipe.json", "training_log.jsonl"
TEMPLATE = "card.md.jinja"
_LINES = 8  # of the training log that a card shows at most
_LICENCE = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Known:
    """What a folder tells about a model; None what it does not."""

    folder: Path
    kind: str  # its model_type, as it stands there
    config: ModelConfig
    activation: str
    origins: tuple[str, ...]  # that it was trained, converted or packed from, the nearest first
    packed: Packed | None
    stats: Stats | None
    profile: Profile | None
    recipe: Recipe | None
    log: list[dict[str, Any]]

    @classmethod
    def of(cls, folder: Path) -> Known:
        raw, config = read_config(folder), read_model_config(folder)
        activation, recipe = activation_of(config), _recipe(folder)
        block = raw.get("turbosparse") or {}
        named = (recipe and recipe.model, block.get("source"), block.get("converted_from"))
        packed = Packed(folder) if is_packed(folder) else None
        stats = None if packed else Stats.find(folder)
        if stats:
            stats.check(config)
            if (seen := stats.about.get("activation")) != activation:
                raise TurboSparseError(
                    f"{folder}: the statistics are of the model run as {seen}, but it is "
                    f"{activation}; run `turbosparse analyse` on it"
                )
        return cls(
            folder=folder,
            kind=raw["model_type"],
            config=config,
            activation=activation,
            origins=tuple(name for name in named if isinstance(name, str)),
            packed=packed,
            stats=stats,
            profile=_profile(packed, stats),
            recipe=recipe,
            log=_log(folder),
        )

    @property
    def made(self) -> bool:
        """Whether this package made it: the stock model of others it did not."""
        return bool(self.kind.startswith(families.PREFIX) or self.packed or self.recipe)

    def sparsity(self) -> list[float]:
        """Of each layer; of experts the mean by their tokens."""
        profile = self.profile
        return [1 - share for share in profile.per_layer(profile.active)] if profile else []


def _profile(packed: Packed | None, stats: Stats | None) -> Profile | None:
    if packed:
        return packed.header.profile
    return stats.profile() if stats else None


def _recipe(folder: Path) -> Recipe | None:
    if not (folder / RECIPE).is_file():
        return None
    return parse_recipe(read_config(folder, RECIPE), str(folder / RECIPE))


def _log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a training log, at most `_LINES`, from the first to the last."""
    path = folder / LOG
    if not path.is_file():
        return []
    names = ("step", "tokens", "loss", "activation_sparsity")
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [{name: line[name] for name in names} for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise TurboSparseError(f"{path} is not a training log ({error}); remove it") from error
    last = len(rows) - 1
    return [rows[at] for at in sorted({round(last * n / (_LINES - 1)) for n in range(_LINES)})]


def write_card(
    known: Known,
    *,
    repo: str,
    control: Known | None,
    base: str | None,
    license: str | None,
    predictor: str | None,
    alone: bool,
) -> str:
    """The text of the card; see `publish` for what it is made of.

    Args:
        predictor: in words, None without one.
        alone: whether transformers loads the model without this package.
    """
    import jinja2

    base, about = _base(known, base)
    text = Path(__file__).with_name(TEMPLATE).read_text(encoding="utf-8")
    words = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    words.filters |= {
        "percent": "{:.1%}".format,
        "commas": "{:,}".format,
        "figure": "{:.3f}".format,
    }
    return words.from_string(text).render(
        _model(known) | _measured(known, control),
        metadata=_metadata(known, base, {"license": license} if license else about, alone=alone),
        repo=repo,
        base=base,
        version=__version__,
        predictor=predictor,
        alone=alone,
        made=known.made,
        own=known.kind.startswith(families.PREFIX),
        chart=CHART,
        training=_training(known),
        log=known.log,
    )


def _base(known: Known, given: str | None) -> tuple[str | None, dict[str, Any]]:
    """The base by its name on the hub, and what its card says of its licence.

    A name that was not `given` counts only if the hub has a card of it: it may be that of a folder.
    """
    for name in [given] if given else known.origins:
        name = name.partition("@")[0]
        here = Path(name).is_dir()
        if (about := _terms(name, here=here)) is not None:
            return (None if here else name), about
    return given, {}


def _terms(name: str, *, here: bool) -> dict[str, Any] | None:
    """The licence in the card of a model, in a folder or on the hub; None without a card."""
    from huggingface_hub import ModelCard

    if not (here or is_hub_id(name)):
        return None
    try:
        data = ModelCard.load(Path(name) / CARD if here else name).data.to_dict()
    except Exception:  # there is none, or no network, or its metadata are broken
        return None
    return {key: data[key] for key in _LICENCE if key in data}


def _metadata(known: Known, base: str | None, licence: dict[str, Any], *, alone: bool) -> str:
    from huggingface_hub import ModelCardData

    if base is None:
        note("what the model was made from is not on the hub, so the card does not say it: --base")
    if not licence:
        note("the licence of the base is not known, so the card names none: --license")
    data = ModelCardData(
        **licence,
        base_model=base,
        library_name="transformers" if alone else "turbosparse",
        pipeline_tag="text-generation",
        tags=["turbosparse", known.activation, *(["arxiv:2406.05955"] if known.made else [])],
    )
    return str(data.to_yaml())


def _model(known: Known) -> dict[str, Any]:
    config, experts = known.config, families.experts(known.config)
    record, sparsity = ACTIVATIONS[known.activation], known.sparsity()
    inside = f"{experts} experts of " if experts else ""
    return {
        "family": str(families.family(config.model_type)).title(),
        "activation": known.activation,
        "formula": record.formula,
        "zeros": bool(record.zero_by),
        "parameters": count_parameters(config).total,
        "activated": sparsity and count_parameters(config, active=1 - mean(sparsity)).activated,
        "rule": RULE,
        "shape": f"{config.num_hidden_layers} layers, {inside}{config.intermediate_size:,} "
        f"neurons, hidden size {config.hidden_size:,}",
        "experts": experts,
        "context": config.context,
        "quant": known.packed and known.packed.quant,
    }


def _measured(known: Known, control: Known | None) -> dict[str, Any]:
    sparsity = known.sparsity()
    ordered = sorted(enumerate(sparsity), key=lambda item: item[1])
    return {
        "sparsity": mean(sparsity) if sparsity else None,
        "layers": (ordered[0], ordered[-1]) if ordered else None,
        "corpora": _corpora(known, control),
        "control": control and _describe(known, control),
    }


def _corpora(known: Known, control: Known | None) -> list[dict[str, Any]]:
    """A row for each text that was measured; a packed folder knows them only in sum."""
    stats, profile = known.stats, known.profile
    if stats:
        return [
            {
                "name": Path(corpus).name,
                "tokens": tokens,
                "perplexity": stats.perplexity(corpus),
                "sparsity": stats.sparsity[corpus],
                "control": control and _control(control, corpus, tokens),
            }
            for corpus, tokens in stats.predicted.items()
        ]
    if not profile:
        return []
    row = {"tokens": profile.tokens, "perplexity": math.exp(profile.nats_per_token)}
    return [row | {"name": "before quantising", "sparsity": mean(known.sparsity())}]


def _control(control: Known, corpus: str, tokens: int) -> float:
    """The control's perplexity on the same text."""
    if control.stats is None or control.stats.predicted.get(corpus) != tokens:
        raise TurboSparseError(
            f"the control {control.folder} was not measured on the {tokens} tokens of {corpus}; "
            "run `turbosparse analyse` on both with the same --data"
        )
    return control.stats.perplexity(corpus)


def _describe(known: Known, control: Known) -> str:
    """What the control is; that it saw the same tokens is said only if the recipes agree."""
    other = {"model": None, "activation": None}
    ours, theirs = (k.recipe and k.recipe.model_copy(update=other) for k in (known, control))
    same = ours is not None and ours == theirs
    how = ", trained by the same recipe on the same tokens" if same else ""
    return f"the {control.activation} model{how}"


def _training(known: Known) -> dict[str, str]:
    recipe = known.recipe
    if recipe is None:
        return {}
    data = recipe.data
    shares = [
        f"{source.name} {source.proportion:.0%}"
        + (f" ({source.dataset})" if source.dataset else "")
        for source in data.sources
    ]
    return {
        "tokens": f"{known.log[-1]['tokens'] if known.log else recipe.tokens:,}",
        "data": ", ".join(shares),
        "batch": f"{recipe.batch_size} sequences of {data.sequence_length:,} tokens",
        "learning rate": f"{recipe.learning_rate:g}, by a cosine to {recipe.min_learning_rate:g}",
        "seed": str(recipe.seed),
    }


def draw(known: Known, path: Path) -> None:
    """Plot the activation sparsity of each layer; of experts also their spread.

    Raises:
        TurboSparseError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise TurboSparseError("the plot of a card needs matplotlib: pip install it") from error
    assert known.profile is not None
    figure = Figure(figsize=(7.2, 2.6), layout="constrained")
    axes = figure.subplots()
    layers = range(known.config.num_hidden_layers)
    axes.bar(layers, [100 * share for share in known.sparsity()], color="#3d8bcd")
    if families.experts(known.config):
        seen = zip(known.profile.active, known.profile.expert_tokens, strict=True)
        spread = [
            [100 * (1 - share) for share, count in zip(*layer, strict=True) if count]
            for layer in seen
        ]
        axes.vlines(layers, [*map(min, spread)], [*map(max, spread)], color="#333333")
    axes.set(xlabel="layer", ylabel="activation sparsity, %", ylim=(0, 100))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    with new_file(path) as work:
        figure.savefig(work, format="png", dpi=150)
