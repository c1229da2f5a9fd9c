"""The recipe: everything that a training run is made of, read from YAML and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from turbosparse.base.errors import TurboSparseError
from turbosparse.hf.activations import Activation
from turbosparse.training.mixture import Mixture

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
_Beta = Annotated[float, Field(ge=0, lt=1)]


class Lora(BaseModel):
    """Train low-rank additions to the named matrices only; they are merged into the result."""

    model_config = _STRICT

    rank: int = Field(16, gt=0)
    alpha: int = Field(32, gt=0)
    targets: list[Annotated[str, Field(min_length=1)]] = Field(
        default=["q_proj", "k_proj", "v_proj", "o_proj"], min_length=1
    )


class L1(BaseModel):
    """Press Combined towards zero, as ProSparse does."""

    model_config = _STRICT

    weight: float = Field(gt=0, description="of the mean of |Combined| over all its entries")
    warmup_steps: int = Field(0, ge=0, description="in which the weight grows from 0")


class Distil(BaseModel):
    """Learn from the next-token probabilities of a teacher, the dense model, besides the text."""

    model_config = _STRICT

    model: str = Field(description="folder or hub id; it has the tokens of the model")
    weight: float = Field(
        0.5, gt=0, le=1, description="its share of the loss; the text's: the rest"
    )


class InTheLoop(BaseModel):
    """Train the predictor of the model's folder beside it, at last with its mask applied."""

    model_config = _STRICT

    weight: float = Field(1.0, gt=0, description="of the loss of its scores")
    share: float = Field(
        0.5, ge=0, le=1, description="of the steps, the last ones, with the mask; 0: none"
    )
    carry: float = Field(
        0.99, gt=0, le=1, description="it learns to find the neurons with this share of the output"
    )


class Recipe(BaseModel):
    """Everything that a training run is made of; it is written into the model folder."""

    model_config = _STRICT

    model: str | dict[str, Any] = Field(
        description="folder or hub id; or config fields (with model_type): train from scratch"
    )
    tokenizer: str | None = Field(None, description="folder or hub id; by default the model's own")
    activation: Activation | None = Field(None, description="by default the model's own")
    data: Mixture
    tokens: int = Field(gt=0, description="training tokens in all")
    batch_size: int = Field(gt=0, description="sequences per optimiser step, over all processes")
    micro_batch_size: int | None = Field(None, gt=0, description="sequences per forward pass")
    learning_rate: float = Field(gt=0)
    min_learning_rate: float = Field(0.0, ge=0, description="where the cosine ends")
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.1, ge=0)
    betas: tuple[_Beta, _Beta] = (0.9, 0.95)
    clip_norm: float = Field(1.0, gt=0, description="gradient norm is clipped to this")
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    shard: Literal["none", "full"] = Field(
        "none", description="full: weights, gradients and optimiser spread over the processes"
    )
    offload: bool = Field(
        False, description="with shard: full, keep weights, gradients and moments in host memory"
    )
    deepspeed: dict[str, Any] | None = Field(None, description="its config, instead of shard")
    gradient_checkpointing: bool = Field(
        False, description="keep only the inputs of layers and compute the rest again"
    )
    router_aux_loss_coef: float | None = Field(
        None, ge=0, description="weight of the loss that spreads tokens over experts"
    )
    lora: Lora | None = Field(None, description="train low-rank additions instead of all weights")
    seed: int = Field(0, ge=0, lt=2**32)
    log_every: int = Field(10, gt=0, description="steps")
    checkpoint_every: int = Field(200, gt=0, description="steps")
    report_to: list[str] = Field(default_factory=list, description="trackers, such as tensorboard")
    l1: L1 | None = None
    teacher: Distil | None = None
    predictor: InTheLoop | None = None

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        step = self.batch_size * self.data.sequence_length
        if self.tokens < step:
            raise ValueError(
                f"tokens {self.tokens} are less than one step of batch_size × sequence_length = "
                f"{step}; raise tokens or lower batch_size"
            )
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate {self.min_learning_rate:g} is above learning_rate "
                f"{self.learning_rate:g}"
            )
        if self.predictor and not isinstance(self.model, str):
            raise ValueError("predictor is that of a model folder: a new model has none")
        # what both do happens in the whole model of a process
        others = {
            "shard: full": self.shard == "full",
            "deepspeed": self.deepspeed is not None,
            "lora": self.lora is not None,
        }
        for name, part, wrong in (
            ("teacher", self.teacher, others),
            (
                "predictor",
                self.predictor,
                others | {"gradient_checkpointing": self.gradient_checkpointing},
            ),
        ):
            if part and (found := [other for other, there in wrong.items() if there]):
                raise ValueError(f"{name} and {found[0]} do not go together: leave out one of them")
        return self

    def steps(self) -> int:
        return self.tokens // (self.batch_size * self.data.sequence_length)


def read_recipe(path: Path, **overrides: Any) -> Recipe:
    """Read a YAML recipe; keys in `overrides` that are not None replace its own."""
    import yaml

    if not path.is_file():
        raise TurboSparseError(f"no such recipe: {path}")
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise TurboSparseError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(fields, dict):
        raise TurboSparseError(f"{path} is not a recipe: it holds no keys")
    fields |= {key: value for key, value in overrides.items() if value is not None}
    return parse_recipe(fields, str(path))


def parse_recipe(fields: dict[str, Any], where: str) -> Recipe:
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc'])) or 'recipe'}: {fault['msg']}"
            for fault in error.errors()
        )
        raise TurboSparseError(f"{where}: {faults}") from error


def tokenizer_of(recipe: Recipe) -> Any:
    """The recipe's tokenizer, which knows ChatML if there is a chat among the sources."""
    from turbosparse.hf.load import load_tokenizer
    from turbosparse.training import chatml

    tokenizer = load_tokenizer(_tokenizer_source(recipe))
    if recipe.data.chat:
        chatml.teach_tokenizer(tokenizer)
    return tokenizer


def _tokenizer_source(recipe: Recipe) -> str:
    source = recipe.tokenizer or recipe.model
    if isinstance(source, dict):
        raise TurboSparseError(
            "the recipe trains from scratch: name a tokenizer (folder or hub id)"
        )
    return source


def micro_batch(recipe: Recipe, processes: int) -> tuple[int, int]:
    """Sequences per forward pass, and the number of processes that share a batch."""
    micro = recipe.micro_batch_size or max(1, recipe.batch_size // processes)
    if recipe.batch_size % (micro * processes):
        raise TurboSparseError(
            f"batch_size {recipe.batch_size} is not a multiple of "
            f"micro_batch_size {micro} × {processes} processes"
        )
    return micro, processes
