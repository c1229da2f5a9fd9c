"""Load and export models: the stock classes for dense ones, ours for sparse ones."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from turbosparse.base.errors import TurboSparseError
from turbosparse.base.folders import companions, read_config
from turbosparse.hf import families
from turbosparse.hf.activations import ACTIVATIONS, stock
from turbosparse.hf.config import parse
from turbosparse.hf.hub import model_folder
from turbosparse.hf.published import mend_generation, own_fields, record_of, with_cache

CODE = ("ffn_activation.py", "modeling_drelu.py", "modeling_drelu_moe.py")


def _classes(base: str) -> tuple[ModuleType, str]:
    from turbosparse.hf import modeling_drelu, modeling_drelu_moe

    title = {"mistral": "Mistral", "llama": "Llama", "qwen2": "Qwen2", "mixtral": "Mixtral"}[base]
    return (modeling_drelu_moe if base == "mixtral" else modeling_drelu), f"DReLU{title}"


def register() -> None:
    """Make ``AutoConfig`` and ``AutoModelForCausalLM`` know our classes; it may be called again."""
    from transformers import AutoConfig, AutoModelForCausalLM

    for base in families.GATED:
        module, name = _classes(base)
        config, model = getattr(module, f"{name}Config"), getattr(module, f"{name}ForCausalLM")
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)


def load_config(folder: Path, activation: str | None = None) -> Any:
    """Read the config of a supported model folder into its transformers class.

    Args:
        folder: of a model.
        activation: run the weights with this FFN activation instead of the folder's own.

    Raises:
        TurboSparseError: unsupported, or the folder does not say its activation and none is given.
    """
    from transformers import CONFIG_MAPPING

    where = folder / "config.json"
    raw = own_fields(folder)
    parse(raw, where)
    register()
    # an implementation that a config names may be code on the hub
    raw = {key: value for key, value in raw.items() if "_implementation" not in key}
    try:
        config = CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    except Exception as error:  # transformers validates with several unrelated exception types
        raise TurboSparseError(f"{where} is not valid: {error}") from error
    if activation and activation != getattr(config, "ffn_activation", None):
        return with_activation(config, activation)
    activation_of(config)
    return config


def check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise TurboSparseError(
            f"activation {activation!r} is unknown; use {', '.join(ACTIVATIONS)}"
        )


def activation_of(config: Any) -> str:
    """The FFN activation of a config; for stock classes it follows from ``hidden_act``.

    Raises:
        TurboSparseError: it does not.
    """
    if config.model_type.startswith(families.PREFIX):
        activation = str(config.ffn_activation)
        check_activation(activation)
        return activation
    found = stock(config.model_type)[config.hidden_act]
    if found is None:
        formulas = " or ".join(
            f"--activation {name} for {ACTIVATIONS[name].formula}" for name in ("reglu", "drelu")
        )
        raise TurboSparseError(
            f"hidden_act {config.hidden_act!r} does not say which feed-forward the model was "
            f"trained with: give {formulas} (its model card says which)"
        )
    return found


def threshold_of(config: Any) -> float:
    """A gate at most this large is inactive; 0 but for FATReLU."""
    return float(getattr(config, "ffn_threshold", None) or 0)


def with_activation(config: Any, activation: str, threshold: float = 0.0) -> Any:
    """The same architecture with another FFN activation: the stock config class or ours."""
    from transformers import AutoConfig

    register()
    keys = activation_keys(config.model_type, activation, threshold)
    own = {"model_type", "architectures", "auto_map", "ffn_activation", "ffn_threshold"}
    fields = {key: value for key, value in config.to_dict().items() if key not in own}
    fields |= {
        key: value for key, value in keys.items() if key not in ("architectures", "auto_map")
    }
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars that transformers draws even for a model of a second."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_model(
    source: str | Path, *, activation: str | None = None, dtype: Any = None, empty: bool = False
) -> Any:
    """Load a model folder for training or analysis.

    Args:
        source: model folder or hub id.
        activation: run the weights with this FFN activation instead of the folder's own.
        dtype: torch dtype; None keeps the folder's.
        empty: leave the weights unread. They take no memory until something is written into them.

    Raises:
        TurboSparseError: unsupported architecture, or tensors that do not fit the config.
    """
    from turbosparse.hf.checkpoint import Checkpoint

    folder = model_folder(source)
    config = load_config(folder, activation)
    Checkpoint(folder).check(config)
    if empty:
        return _empty_model(config, dtype)
    return read_weights(folder, config, dtype)


def read_weights(folder: Path, config: Any, dtype: Any = None) -> Any:
    """A model of this config with the tensors of a folder, in whatever names they stand there.

    Raises:
        TurboSparseError: the folder lacks a tensor of the model, holds one that the model has no
            place for, or one of another shape. Those of a predictor belong to a packed model only.
    """
    from transformers import AutoModelForCausalLM

    try:
        with quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype or "auto",
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # else its own exception names nothing
                output_loading_info=True,
            )
    except (ValueError, TypeError, AttributeError, KeyError, ImportError) as error:
        raise TurboSparseError(
            f"{folder} cannot be loaded ({type(error).__name__}: {error})"
        ) from error
    unexpected = [name for name in info["unexpected_keys"] if ".predictor." not in name]
    faults = {
        "is missing": info["missing_keys"],
        "has no place in the model": unexpected,
        "has another shape": [name for name, *_ in info["mismatched_keys"]],
        "cannot be converted": info.get("conversion_errors", ()),
    }
    found = [f"{name} {what}" for what, names in faults.items() for name in sorted(names)]
    if found:
        more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
        raise TurboSparseError(
            f"{folder}: config.json and the tensors disagree: {'; '.join(found[:3])}{more}; "
            "use the config.json that belongs to these weights"
        )
    return model


def _empty_model(config: Any, dtype: Any) -> Any:
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):  # the buffers are computed, not loaded
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                blank = torch.empty(parameter.shape, dtype=dtype)
                module._parameters[name] = torch.nn.Parameter(blank)
    model.tie_weights()
    return model


def new_config(fields: dict[str, Any], *, activation: str | None) -> Any:
    """The config of a model that is described by `fields`; ``model_type`` is a family.

    Without `activation` it is the one that the stock class computes.
    """
    from transformers import AutoConfig

    parse(fields, "the recipe's model")
    base = families.family(fields["model_type"])
    fields = {key: value for key, value in fields.items() if key != "model_type"}
    config = AutoConfig.for_model(base, **fields)
    return with_activation(config, activation or activation_of(config))


def new_model(config: dict[str, Any], *, activation: str | None, seed: int) -> Any:
    """A freshly initialised model of `new_config`."""
    from transformers import AutoModelForCausalLM, set_seed

    built = new_config(config, activation=activation)
    set_seed(seed)
    return AutoModelForCausalLM.from_config(built)


def load_tokenizer(source: str | Path) -> Any:
    """Load the tokenizer of a model folder."""
    from transformers import AutoTokenizer

    folder = model_folder(source, weights=False)
    companions(folder)
    register()  # or it asks to run the code inside a converted folder
    described = (folder / "config.json").is_file()  # a tokenizer may stand alone
    config = load_config(folder) if described and record_of(folder) else None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)
        int(tokenizer.model_max_length)
        return tokenizer
    except Exception as error:  # the libraries below raise many unrelated types
        raise TurboSparseError(
            f"{folder}: the tokenizer cannot be loaded ({type(error).__name__}: {error}); "
            "check its files, or copy those of the original model"
        ) from error


def check_ids(ids: list[int], tokenizer: Any, vocabulary: int) -> list[int]:
    """The `ids` of a text, all inside a model's embedding of `vocabulary` rows.

    Raises:
        TurboSparseError: names the first token that the model does not have.
    """
    if ids and max(ids) >= vocabulary:
        found = next(token for token in ids if token >= vocabulary)
        raise TurboSparseError(
            f"the text holds the token {tokenizer.convert_ids_to_tokens(found)!r} with id {found}, "
            f"but the model has only {vocabulary}; take it out of the text, or use the tokenizer "
            "that belongs to the model"
        )
    return ids


def activation_keys(model_type: str, activation: str, threshold: float = 0.0) -> dict[str, Any]:
    """The keys of ``config.json`` for the same weights with this FFN activation and threshold."""
    check_activation(activation)
    base = str(families.family(model_type))
    own: dict[str, Any] = {"hidden_act": ACTIVATIONS[activation].hidden_act}
    if base not in families.GATED and ACTIVATIONS[activation].gated:
        raise TurboSparseError(
            f"{base} models have no gate, which {activation} reads; leave out the activation, for "
            f"they are sparse already, or use {', '.join(stock(base))}"
        )
    if activation == "swiglu" or base not in families.GATED:
        return own | {"model_type": base}
    own |= {"ffn_activation": activation, "ffn_threshold": threshold}
    return own | sparse_keys(base)


def sparse_keys(base: str) -> dict[str, Any]:
    """The keys of ``config.json`` that name our class, for use with and without our package."""
    module, name = _classes(base)
    file = module.__name__.rpartition(".")[2]
    return {
        "model_type": families.PREFIX + base,
        "architectures": [f"{name}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{file}.{name}Config",
            "AutoModelForCausalLM": f"{file}.{name}ForCausalLM",
        },
    }


def copy_code(out: Path) -> None:
    """Put the modelling files that ``auto_map`` points to into a model folder."""
    here = Path(__file__).parent
    for file in CODE:
        shutil.copyfile(here / file, out / file)


def save_model(
    model: Any, tokenizer: Any, out: Path, *, weights: dict[str, Any] | None = None
) -> None:
    """Write a model folder that loads with our package, and without it by ``trust_remote_code``.

    `weights` stand in for the model's own where these are shards.
    """
    from turbosparse.hf.checkpoint import Checkpoint

    config = model.config
    with quiet():
        model.save_pretrained(out, state_dict=weights)
    tokenizer.save_pretrained(out)
    if config.model_type.startswith(families.PREFIX):
        from turbosparse.base.folders import write_json

        base = str(families.family(config.model_type))
        write_json(out / "config.json", with_cache(read_config(out)) | sparse_keys(base))
        copy_code(out)
    mend_generation(out, read_config(out))
    Checkpoint(out).check(config)
