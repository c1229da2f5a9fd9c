"""Stage 2: recover quality by continued training, or train from scratch.

Reads a recipe (YAML) and the model folder that it names, writes a sparse Hugging Face folder. The
loop is the Hugging Face Trainer's: it runs on one process or under ``torchrun``, and a stopped run
resumes from its last checkpoint when the same command is given again.

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
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbosparse.base.errors import TurboSparseError
from turbosparse.base.folders import (
    AnyPath,
    check_free,
    local_path,
    named_disk_errors,
    new_file,
    new_folder,
    write_json,
)
from turbosparse.base.machine import has_accelerator, world_size
from turbosparse.base.progress import note
from turbosparse.hf.activations import WITHOUT_ZEROS, Activation
from turbosparse.training.arguments import (
    check_trackers,
    penalty_of,
    training_arguments,
    training_config,
    with_adapters,
)
from turbosparse.training.mixture import Skips
from turbosparse.training.plan import Plan, plan_training
from turbosparse.training.recipe import Recipe, read_recipe, tokenizer_of

# What may change when a run resumes: the first row changes what is learnt, the second only how.
_MAY_CHANGE = {"learning_rate", "min_learning_rate", "clip_norm"}
_MAY_CHANGE |= {"micro_batch_size", "gradient_checkpointing", "checkpoint_every", "report_to"}


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


def train(
    recipe: AnyPath,
    *,
    out: AnyPath | None = None,
    model: str | None = None,
    activation: Activation | None = None,
    data: AnyPath | None = None,
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
    recipe = local_path(recipe)
    settings = read_recipe(recipe, model=model, activation=activation, tokens=tokens, seed=seed)
    if plan:
        return plan_training(settings, processes=processes or world_size(), tflops=tflops)
    if out is None:
        raise TurboSparseError("give --out, the folder of the new model (or --plan)")
    if processes is not None or tflops is not None:
        raise TurboSparseError(
            "--processes and --tflops belong to --plan; torchrun starts processes"
        )
    root = local_path(data or recipe.parent)
    return run_recipe(settings, out=local_path(out), root=root, allow_missing=allow_missing)


def run_recipe(recipe: Recipe, *, out: Path, root: Path, allow_missing: bool = False) -> Trained:
    """Train by a recipe object; relative paths in it start from `root`. See `train`."""
    from turbosparse.hf.checkpoint import carry_predictor
    from turbosparse.hf.hub import model_folder
    from turbosparse.hf.load import activation_of, quiet, save_model
    from turbosparse.predictors.loop import in_the_loop
    from turbosparse.training import chatml
    from turbosparse.training.checkpoints import newest_whole, step_of
    from turbosparse.training.loss import chunked_loss
    from turbosparse.training.prepared import found_mixture, training_data
    from turbosparse.training.trainer import SparseTrainer

    check_free(out)
    check_trackers(recipe.report_to)
    mixture = found_mixture(recipe.data, root, allow_missing=allow_missing)
    recipe = recipe.model_copy(update={"data": mixture})
    work = _find_work(recipe, out)
    tokenizer, skips = tokenizer_of(recipe), Skips()
    stream = training_data(recipe, tokenizer, root=root, skips=skips)
    model = _load(recipe, tokenizer)
    arguments = training_arguments(recipe, work)
    predictor = in_the_loop(recipe, model, arguments.device)
    penalty = penalty_of(recipe, activation_of(model.config))
    teacher = _teacher(recipe, tokenizer, arguments)
    atexit.register(_leave_processes)
    adapted = model
    if recipe.lora:
        rows = chatml.tokens(tokenizer) if recipe.data.chat else None
        adapted = with_adapters(model, recipe.lora, seed=recipe.seed, rows=rows)
    trainer = SparseTrainer(
        model=adapted,
        watched=model,
        args=arguments,
        train_dataset=stream,
        log_file=work / "log.jsonl",
        penalties=[part for part in (predictor, penalty) if part],
        predictor=predictor,
    )
    with (
        quiet(),
        named_disk_errors(work),
        training_config(model, recipe, arguments),
        chunked_loss(model, teacher) if teacher or _whole_on_cpu(recipe) else nullcontext(),
    ):
        if trainer.is_world_process_zero():
            with new_file(work / "recipe.json") as file:
                write_json(file, recipe.model_dump(mode="json"))
        checkpoint = newest_whole(work, trainer.accelerator, note)
        if checkpoint:
            note(f"resuming from step {step_of(checkpoint)}")
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
        steps=log[-1]["step"],
        tokens=log[-1]["tokens"],
        seconds=result.metrics["train_runtime"],
        first_loss=log[0]["loss"],
        last_loss=log[-1]["loss"],
        activation_sparsity=log[-1]["activation_sparsity"],
    )
    trainer.accelerator.wait_for_everyone()  # everyone has read it
    if trainer.is_world_process_zero():
        with new_folder(out) as folder:
            save_model(model, tokenizer, folder, weights=weights)
            if isinstance(recipe.model, str) and trained.activation not in WITHOUT_ZEROS:
                tuned = predictor.tensors() if predictor else None
                carry_predictor(model_folder(recipe.model), folder, tuned)
            write_json(folder / "recipe.json", recipe.model_dump(mode="json"))
            shutil.copyfile(work / "log.jsonl", folder / "training_log.jsonl")
        shutil.rmtree(work)
    return trained


def _whole_on_cpu(recipe: Recipe) -> bool:
    """Whether the head is an ordinary matrix in the memory of this process."""
    plain = recipe.shard == "none" and recipe.deepspeed is None and recipe.lora is None
    return plain and not has_accelerator()


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
                "remove it to start again, or give the old settings to resume"
            )
        for key in changed:
            note(f"the stopped run resumes with {key} {mine[key]} instead of {old.get(key)}")
    return work


def _teacher(recipe: Recipe, tokenizer: Any, arguments: Any) -> Any:
    """The recipe's teacher, in the numbers that the machine computes in.

    Raises:
        TurboSparseError: it has other tokens than the model.
    """
    import torch

    from turbosparse.hf.load import load_model, load_tokenizer
    from turbosparse.training.loss import Teacher

    if recipe.teacher is None:
        return None
    source = recipe.teacher.model
    if isinstance(recipe.model, str) and _same_folder(source, recipe.model):
        note(f"{source} would be its own teacher: it learns from the text, as a control")
        return None
    mine = tokenizer.get_vocab()
    other = [
        token for token, i in load_tokenizer(source).get_vocab().items() if mine.get(token) != i
    ]
    if other:
        raise TurboSparseError(
            f"teacher {source} has tokens that the model has not, or at other places, such as "
            f"{other[0]!r}; give the dense model that this one was made of"
        )
    model = load_model(source, dtype=torch.bfloat16 if arguments.bf16 else torch.float32)
    return Teacher(model.eval().requires_grad_(False).to(arguments.device), recipe.teacher.weight)


def _same_folder(one: str, other: str) -> bool:
    from turbosparse.hf.hub import model_folder

    return model_folder(one).resolve() == model_folder(other).resolve()


def _load(recipe: Recipe, tokenizer: Any) -> Any:
    import torch

    from turbosparse.hf.load import load_model, new_model
    from turbosparse.training import chatml

    if isinstance(recipe.model, str):
        # the first process alone reads weights that are going to be sharded, and deals them out
        empty = recipe.shard == "full" and os.environ.get("RANK", "0") != "0"
        model = load_model(
            recipe.model, activation=recipe.activation, dtype=torch.float32, empty=empty
        )
    else:
        model = new_model(recipe.model, activation=recipe.activation, seed=recipe.seed)
    if recipe.data.chat:
        chatml.teach_model(model, tokenizer)
    else:
        chatml.grow(model, tokenizer)
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
    return model
