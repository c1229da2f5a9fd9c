"""Stage 2: recover quality by continued training, or train from scratch.

Reads a recipe (YAML) and the model folder that it names, writes a sparse Hugging Face folder. The
loop is the Hugging Face Trainer's: it runs on one process or under ``torchrun``, and a stopped run
goes on from its last checkpoint when the same command is given again.

    turbosparse train recipes/tiny_cpu.yaml --model mistral-drelu --out mistral-sparse
    turbosparse train recipes/tiny_cpu.yaml --model mistral --out dense-control --activation swiglu
    turbosparse train recipes/tiny_cpu.yaml --plan --processes 8
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from turbosparse.convert import Activation
from turbosparse.data import Mixture, Skips
from turbosparse.folders import (
    TurboSparseError,
    check_free,
    model_folder,
    named_disk_errors,
    new_file,
    new_folder,
    write_json,
)
from turbosparse.plan import Plan, plan_training
from turbosparse.progress import note

# What a stopped run may go on with: the first row changes what is learnt, the second only how.
_MAY_CHANGE = {"learning_rate", "min_learning_rate", "clip_norm"}
_MAY_CHANGE |= {"micro_batch_size", "gradient_checkpointing", "checkpoint_every", "report_to"}


class Lora(BaseModel):
    """Train low-rank additions to the named matrices only; they are merged into the result."""

    model_config = ConfigDict(extra="forbid")

    rank: int = Field(16, gt=0)
    alpha: int = Field(32, gt=0)
    targets: list[str] = Field(default=["q_proj", "k_proj", "v_proj", "o_proj"], min_length=1)


class L1(BaseModel):
    """Press Combined towards zero, as ProSparse does."""

    model_config = ConfigDict(extra="forbid")

    weight: float = Field(gt=0, description="of the mean of |Combined| over all its entries")
    warmup_steps: int = Field(0, ge=0, description="in which the weight grows from 0")


class Recipe(BaseModel):
    """Everything that a training run is made of; it is written into the model folder."""

    model_config = ConfigDict(extra="forbid")

    model: str | dict[str, Any] = Field(
        description="folder or hub id; or config fields (with model_type): train from scratch"
    )
    tokenizer: str | None = Field(None, description="folder or hub id; by default the model's own")
    activation: Activation | None = Field(None, description="by default the model's own")
    calibration_tokens: int = Field(
        65_536, ge=0, description="fit a dense model to dReLU on the first so many; 0: do not"
    )
    data: Mixture
    tokens: int = Field(gt=0, description="training tokens in all")
    batch_size: int = Field(gt=0, description="sequences per optimiser step, over all processes")
    micro_batch_size: int | None = Field(None, gt=0, description="sequences per forward pass")
    learning_rate: float = Field(gt=0)
    min_learning_rate: float = Field(0.0, ge=0, description="where the cosine ends")
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.1, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = Field(1.0, gt=0, description="gradient norm is clipped to this")
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    shard: Literal["none", "full"] = Field(
        "none", description="full: weights, gradients and optimiser spread over the processes"
    )
    deepspeed: dict[str, Any] | None = Field(None, description="its config, instead of shard")
    gradient_checkpointing: bool = Field(
        False, description="keep only the inputs of layers and compute the rest again"
    )
    router_aux_loss_coef: float | None = Field(
        None, ge=0, description="weight of the loss that spreads tokens over experts"
    )
    lora: Lora | None = Field(None, description="train low-rank additions instead of all weights")
    seed: int = 0
    log_every: int = Field(10, gt=0, description="steps")
    checkpoint_every: int = Field(200, gt=0, description="steps")
    report_to: list[str] = Field(default_factory=list, description="trackers, such as tensorboard")
    l1: L1 | None = None

    def steps(self) -> int:
        return max(1, self.tokens // (self.batch_size * self.data.sequence_length))


@dataclass(frozen=True)
class Trained:
    """What `train` wrote and saw."""

    out: str
    activation: str
    steps: int
    tokens: int
    seconds: float
    first_loss: float
    last_loss: float
    activation_sparsity: float

    def __str__(self) -> str:
        return (
            f"{self.out}: {self.activation}, {self.tokens / 1e6:.2f} M tokens "
            f"in {self.seconds:.0f} s, "
            f"loss {self.first_loss:.3f} → {self.last_loss:.3f} nats/token, "
            f"activation sparsity {self.activation_sparsity:.1%}"
        )


def read_recipe(path: Path, **overrides: Any) -> Recipe:
    """Read a YAML recipe; keys in `overrides` that are not None replace its own."""
    import yaml

    if not path.is_file():
        raise TurboSparseError(f"no such recipe: {path}")
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
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


def train(
    recipe: Path,
    *,
    out: Path | None = None,
    model: str | None = None,
    activation: Activation | None = None,
    data: Path | None = None,
    tokens: int | None = None,
    seed: int | None = None,
    allow_missing: bool = False,
    plan: bool = False,
    processes: int | None = None,
    tflops: float | None = None,
) -> Trained | Plan:
    """Train a model by a recipe; give the same command again to resume a stopped run.

    Parameters
    ----------
    recipe
        YAML file; recipes/tiny_cpu.yaml explains its keys.
    out
        New model folder. Checkpoints and the log stand in OUT.training until the run is complete.
    model
        Start from this model folder or hub id instead of the recipe's.
    activation
        Run the weights with this FFN activation: swiglu makes the dense control of the same recipe.
    data
        Folder that the recipe's relative paths start from; by default the recipe's own folder. A
        file or folder in it with the name of a source stands in for that source's hub data set. Or
        a folder that `turbosparse data prepare` wrote.
    tokens
        Train on this many tokens instead of the recipe's.
    seed
        Seed of initialisation and order instead of the recipe's.
    allow_missing
        Leave out sources that cannot be opened, and raise the proportions of the others.
    plan
        Train nothing: print memory for each process, steps and FLOPs. Reads only the config.
    processes
        Plan for this many processes; by default those of torchrun, or one.
    tflops
        Plan the time at this many TFLOP/s that a process sustains.
    """
    settings = read_recipe(recipe, model=model, activation=activation, tokens=tokens, seed=seed)
    if plan:
        return plan_training(settings, processes=processes or world_size(), tflops=tflops)
    if out is None:
        raise TurboSparseError("give --out, the folder of the new model (or --plan)")
    if processes is not None or tflops is not None:
        raise TurboSparseError(
            "--processes and --tflops belong to --plan; torchrun starts processes"
        )
    root = data or recipe.parent
    return run_recipe(settings, out=out, root=root, allow_missing=allow_missing)


def run_recipe(recipe: Recipe, *, out: Path, root: Path, allow_missing: bool = False) -> Trained:
    """Train by a recipe object; relative paths in it start from `root`. See `train`."""
    from turbosparse import chatml
    from turbosparse.checkpoints import newest_whole
    from turbosparse.hf.load import activation_of, quiet, save_model
    from turbosparse.prepare import found_mixture, training_data
    from turbosparse.trainer import SparseTrainer

    check_free(out)
    mixture = found_mixture(recipe.data, root, allow_missing=allow_missing)
    recipe = recipe.model_copy(update={"data": mixture})
    work = _find_work(recipe, out)
    tokenizer, skips = tokenizer_of(recipe), Skips()
    stream = training_data(recipe, tokenizer, root=root, skips=skips)
    model = _load(recipe, tokenizer, stream)
    arguments = _arguments(recipe, work)
    atexit.register(_leave_processes)
    adapted = model
    if recipe.lora:
        rows = chatml.tokens(tokenizer) if recipe.data.chat else None
        adapted = _with_adapters(model, recipe.lora, seed=recipe.seed, rows=rows)
    trainer = SparseTrainer(
        model=adapted,
        watched=model,
        args=arguments,
        train_dataset=stream,
        log_file=work / "log.jsonl",
        penalty=_penalty(recipe),
    )
    if trainer.is_world_process_zero():
        with new_file(work / "recipe.json") as file:
            write_json(file, recipe.model_dump(mode="json"))
    with quiet(), named_disk_errors(work), _training_config(model, recipe, arguments):
        checkpoint = newest_whole(work, trainer.accelerator, note)
        result = trainer.train(resume_from_checkpoint=checkpoint)
        weights = trainer.full_weights()
    skips.report()
    if recipe.lora:
        trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()

    trainer.accelerator.wait_for_everyone()  # the first process has written the log
    log = [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]
    trained = Trained(
        out=str(out),
        activation=activation_of(model.config),
        steps=recipe.steps(),
        tokens=recipe.steps() * recipe.batch_size * recipe.data.sequence_length,
        seconds=result.metrics["train_runtime"],
        first_loss=log[0]["loss"],
        last_loss=log[-1]["loss"],
        activation_sparsity=log[-1]["activation_sparsity"],
    )
    trainer.accelerator.wait_for_everyone()  # everyone has read it
    if trainer.is_world_process_zero():
        with new_folder(out) as folder:
            save_model(model, tokenizer, folder, weights=weights)
            write_json(folder / "recipe.json", recipe.model_dump(mode="json"))
            shutil.copyfile(work / "log.jsonl", folder / "training_log.jsonl")
        shutil.rmtree(work)
    return trained


def _leave_processes() -> None:
    """Close the connections to the other processes, and let gloo's threads come to their end.

    One that still has a tensor to let go when the interpreter ends aborts the process
    (pytorch/pytorch#190489), and destroying a group does not end its threads: while this one
    sleeps they have the interpreter.
    """
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        time.sleep(0.2)


def _find_work(recipe: Recipe, out: Path) -> Path:
    """The folder of checkpoints and log; a run that stands in it must be of this very recipe."""
    work = out.with_name(out.name + ".training")
    stored, mine = work / "recipe.json", recipe.model_dump(mode="json")
    if stored.is_file():
        old = json.loads(stored.read_text())
        changed = sorted(key for key in mine if mine[key] != old.get(key))
        if fixed := [key for key in changed if key not in _MAY_CHANGE]:
            raise TurboSparseError(
                f"{work} holds a stopped run with other settings ({', '.join(fixed)}); "
                "remove it to start anew, or give the old settings to resume"
            )
        for key in changed:
            note(f"the stopped run goes on with {key} {mine[key]} instead of {old.get(key)}")
    return work


def tokenizer_of(recipe: Recipe) -> Any:
    """The recipe's tokenizer, which knows ChatML if there is a chat among the sources."""
    from turbosparse import chatml
    from turbosparse.hf.load import load_tokenizer

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


def _load(recipe: Recipe, tokenizer: Any, stream: Any) -> Any:
    import torch

    from turbosparse import chatml
    from turbosparse.calibrate import calibrate
    from turbosparse.hf.load import load_model, new_model

    surgery = recipe.calibration_tokens and _is_surgery(recipe)
    if surgery and recipe.shard == "full":
        raise TurboSparseError(
            "calibrating a dense model needs all of it in one process: make the dReLU model with "
            "`turbosparse convert --data` and train that, or set calibration_tokens: 0"
        )
    if isinstance(recipe.model, str):
        # the first process alone reads weights that are going to be sharded, and deals them out
        empty = recipe.shard == "full" and os.environ.get("RANK", "0") != "0"
        model = load_model(
            recipe.model, activation=recipe.activation, dtype=torch.float32, empty=empty
        )
    else:
        model = new_model(recipe.model, activation=recipe.activation or "swiglu", seed=recipe.seed)
    if recipe.data.chat:
        chatml.teach_model(model, tokenizer)
    context, length = model.config.max_position_embeddings, recipe.data.sequence_length
    if length > context:
        raise TurboSparseError(
            f"sequence_length {length} is longer than the model's context {context}"
        )
    if len(tokenizer) > model.config.vocab_size:
        raise TurboSparseError(
            f"the tokenizer has {len(tokenizer)} tokens, the model only {model.config.vocab_size}; "
            "use the tokenizer that belongs to the model"
        )
    if surgery:
        count = min(recipe.calibration_tokens, recipe.tokens) // length
        if rows := [list(row["input_ids"]) for row in islice(stream, count)]:
            note(f"calibrating on {len(rows) * length} tokens")
            calibrate(model, rows)
    return model


def _is_surgery(recipe: Recipe) -> bool:
    """Whether the recipe makes a dReLU model of a dense SwiGLU one."""
    from turbosparse.hf.load import activation_of, load_config

    if not isinstance(recipe.model, str) or recipe.activation != "drelu":
        return False
    return activation_of(load_config(model_folder(recipe.model))) == "swiglu"


def _with_adapters(model: Any, lora: Lora, *, seed: int, rows: list[int] | None) -> Any:
    """The model with low-rank adapters beside the matrices of `lora`.

    Nothing else is trained but the `rows` of the embedding and the head, those of new tokens.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise TurboSparseError("lora needs the package peft; pip install peft") from None
    from transformers import set_seed

    there = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    if missing := [target for target in lora.targets if target not in there]:
        raise TurboSparseError(f"lora: the model has no module {', '.join(missing)}")
    tied = model.config.tie_word_embeddings
    tables = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    set_seed(seed)
    model.name_or_path = ""  # else peft looks up there whether the vocabulary has grown, and warns
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=lora.targets,
        trainable_token_indices=dict.fromkeys(tables, rows) if rows else None,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft uses older names of transformers
        return get_peft_model(model, settings)


@contextmanager
def _training_config(model: Any, recipe: Recipe, arguments: Any) -> Iterator[None]:
    """The model with the settings that only training wants."""
    config = model.config
    router_logits = getattr(config, "output_router_logits", False)
    config.use_cache = False
    if hasattr(config, "router_aux_loss_coef"):
        if recipe.router_aux_loss_coef is not None:
            config.router_aux_loss_coef = recipe.router_aux_loss_coef
        config.output_router_logits = True
        # The library adds it once in each forward pass of a step, on every process, where the
        # tokens' loss is shared out among these.
        passes = arguments.gradient_accumulation_steps * arguments.world_size
        model.router_aux_loss_coef = config.router_aux_loss_coef / passes
    try:
        yield
    finally:
        config.use_cache = True
        if hasattr(config, "router_aux_loss_coef"):
            config.output_router_logits = router_logits


def _penalty(recipe: Recipe) -> Any:
    from turbosparse.l1 import L1Penalty

    if recipe.l1 is None:
        return None
    if recipe.gradient_checkpointing:
        raise TurboSparseError(
            "gradient_checkpointing runs the layers again for their gradients, where l1 does not "
            "see them: leave out one of them"
        )
    return L1Penalty(recipe.l1.weight, recipe.l1.warmup_steps)


def _arguments(recipe: Recipe, work: Path) -> Any:
    import torch
    from transformers import TrainingArguments

    micro, processes = micro_batch(recipe, world_size())
    bf16 = uses_bf16(recipe.precision)
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=recipe.steps(),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=recipe.batch_size // (micro * processes),
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": recipe.min_learning_rate / recipe.learning_rate},
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        adam_beta1=recipe.betas[0],
        adam_beta2=recipe.betas[1],
        max_grad_norm=recipe.clip_norm,
        bf16=bf16,
        seed=recipe.seed,
        train_sampling_strategy="sequential",  # a prepared folder is in its order already
        logging_steps=recipe.log_every,
        logging_nan_inf_filter=False,  # SparseTrainer stops there
        save_steps=recipe.checkpoint_every,
        save_total_limit=2,
        report_to=recipe.report_to or "none",
        use_cpu=not _has_accelerator(),
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,  # SparseTrainer has its own bar
        **_scale_arguments(recipe, processes),
    )
    if recipe.shard == "full" and bf16:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        # the library would add the gradients of all processes up in bf16
        arguments.fsdp_plugin_args["mixed_precision_policy"] = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.bfloat16
        )
    return arguments


def _scale_arguments(recipe: Recipe, processes: int) -> dict[str, Any]:
    """What the library is told of sharding and gradient checkpointing."""
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        if os.environ.get(name, "").lower() in ("1", "true"):
            raise TurboSparseError(
                f"{name} is set (by accelerate launch?), but what shards a model here is "
                "shard: full or deepspeed in the recipe, with torchrun; start it so"
            )
    whole: dict[str, Any] = {}
    if recipe.gradient_checkpointing:  # the library has another word for it
        settings = {"use_reentrant": False}
        whole = {"activation_checkpointing": True, "activation_checkpointing_kwargs": settings}
    if recipe.deepspeed is not None:
        return {"deepspeed": _deepspeed_config(recipe), **whole}
    if recipe.shard == "none":
        return whole
    if processes == 1:
        raise TurboSparseError(
            "shard: full spreads the model over several processes, and this is one; start it with "
            "torchrun --nproc_per_node GPUS -m turbosparse.cli train …, or set shard: none"
        )
    if recipe.lora:
        raise TurboSparseError("lora and shard: full do not go together; set shard: none")
    return {
        "fsdp": True,
        "fsdp_config": {
            "state_dict_type": "SHARDED_STATE_DICT",  # each process writes its part
            "cpu_ram_efficient_loading": True,
            "activation_checkpointing": recipe.gradient_checkpointing,
        },
        # else the gradients of a step would stand whole on every process until its last pass
        "accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}},
    }


def _deepspeed_config(recipe: Recipe) -> dict[str, Any]:
    """The user's config, and what the recipe says already."""
    if not _has_accelerator():  # the library would leave it out in silence
        raise TurboSparseError("deepspeed needs GPUs, and this machine has none; leave it out")
    if find_spec("deepspeed") is None:
        raise TurboSparseError("deepspeed needs the package deepspeed; pip install deepspeed")
    if "LOCAL_RANK" not in os.environ:
        raise TurboSparseError("deepspeed wants torchrun --nproc_per_node GPUS, also for one GPU")
    if recipe.lora or recipe.shard == "full":
        other = "lora" if recipe.lora else "shard: full"
        raise TurboSparseError(f"deepspeed and {other} do not go together; leave one out")
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        **(recipe.deepspeed or {}),
    }


def _has_accelerator() -> bool:
    import torch

    return torch.cuda.is_available()


def world_size() -> int:
    """The processes of this run, by torchrun's word."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def micro_batch(recipe: Recipe, processes: int) -> tuple[int, int]:
    """Sequences per forward pass, and the number of processes that share a batch."""
    micro = recipe.micro_batch_size or max(1, recipe.batch_size // processes)
    if recipe.batch_size % (micro * processes):
        raise TurboSparseError(
            f"batch_size {recipe.batch_size} is no multiple of "
            f"micro_batch_size {micro} × {processes} processes"
        )
    return micro, processes


def uses_bf16(precision: str) -> bool:
    import torch

    if precision != "auto":
        return precision == "bf16"
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    machine = torch.cpu.get_capabilities()
    return bool(machine.get("amx_bf16") or machine.get("avx512_bf16"))
