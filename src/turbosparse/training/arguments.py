"""A recipe in the words of the libraries that carry it out: Trainer, FSDP, DeepSpeed, peft."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from turbosparse.base.errors import TurboSparseError
from turbosparse.base.machine import has_accelerator, uses_bf16, world_size
from turbosparse.base.progress import note
from turbosparse.hf.activations import WITHOUT_ZEROS
from turbosparse.training.recipe import Lora, Recipe, micro_batch

# Seconds that processes wait for the first one, which reads again what a stopped run has seen of a
# stream. A prepared folder needs no reading again.
_WAIT = 24 * 3600


def with_adapters(model: Any, lora: Lora, *, seed: int, rows: list[int] | None) -> Any:
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
def training_config(model: Any, recipe: Recipe, arguments: Any) -> Iterator[None]:
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


def penalty_of(recipe: Recipe, activation: str) -> Any:
    """The recipe's l1, for a model with this activation: the dense control has no zeros to gain."""
    from turbosparse.training.l1 import L1Penalty

    if recipe.l1 is None:
        return None
    if activation in WITHOUT_ZEROS:
        note(f"{activation} has no zeros: the recipe's l1 is left out")
        return None
    if recipe.gradient_checkpointing:
        raise TurboSparseError(
            "gradient_checkpointing runs the layers again for their gradients, where l1 does not "
            "see them: leave out one of them"
        )
    return L1Penalty(recipe.l1.weight, recipe.l1.warmup_steps)


def check_trackers(names: list[str]) -> None:
    """Refuse what the library would not know or not find once the model is loaded."""
    from transformers.integrations import integration_utils

    known = set(integration_utils.INTEGRATION_TO_CALLBACK)
    there = known.intersection(integration_utils.get_available_reporting_integrations())
    if missing := [name for name in names if name not in there]:
        why = "is not installed" if missing[0] in known else "is not known"
        raise TurboSparseError(
            f"report_to: {missing[0]} {why}; known are {', '.join(sorted(known))}, "
            f"installed {', '.join(sorted(there)) or 'none of them'}"
        )


def training_arguments(recipe: Recipe, work: Path) -> Any:
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
        use_cpu=not has_accelerator(),
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_timeout=_WAIT if recipe.data.prepared is None else 1800,
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
    import torch

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
        if recipe.offload:
            raise TurboSparseError("offload belongs to shard: full; set both, or neither")
        return whole
    if processes == 1:
        raise TurboSparseError(
            "shard: full spreads the model over several processes, and this is one; start it with "
            "torchrun --nproc_per_node GPUS -m turbosparse.cli train …, or set shard: none"
        )
    if recipe.lora:
        raise TurboSparseError("lora and shard: full do not go together; set shard: none")
    # what is offloaded is added up on the CPU, which NCCL cannot do
    backend = {"ddp_backend": "cuda:nccl,cpu:gloo"} if torch.cuda.is_available() else {}
    return {
        "fsdp": True,
        **(backend if recipe.offload else {}),
        "fsdp_config": {
            "state_dict_type": "SHARDED_STATE_DICT",  # each process writes its part
            "cpu_ram_efficient_loading": True,
            "cpu_offload": recipe.offload,
            "activation_checkpointing": recipe.gradient_checkpointing,
        },
        # else the gradients of a step would stand whole on every process until its last pass
        "accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}},
    }


def _deepspeed_config(recipe: Recipe) -> dict[str, Any]:
    """The user's config, and what the recipe says already."""
    if not has_accelerator():  # the library would leave it out in silence
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
