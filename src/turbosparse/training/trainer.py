"""The Hugging Face Trainer, with activation sparsity in whatever it logs and one progress bar."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.trainer_utils import TrainOutput

from turbosparse.base.errors import TurboSparseError
from turbosparse.base.folders import new_file
from turbosparse.base.progress import Lines
from turbosparse.training.checkpoints import load_weights, seal, step_of
from turbosparse.training.l1 import Penalty
from turbosparse.training.meter import Meter


class SparseTrainer(Trainer):
    """Measures sparsity in the steps that it logs, and keeps the log as JSON lines.

    `watched` is the bare model where `model` wraps it in adapters; `penalties` are added to the
    loss, and `predictor` (`predictors.loop`), which is one of them, is trained beside the model.
    Checkpoints are sealed, a loss that is not finite stops the run, and sharding
    that was asked for happens or is refused.
    """

    def __init__(
        self,
        *,
        log_file: Path,
        penalties: Sequence[Penalty] = (),
        predictor: Any = None,
        watched: Any = None,
        **arguments: Any,
    ):
        self.log_callback = _Log(log_file)
        super().__init__(**arguments, callbacks=[self.log_callback])
        self.remove_callback(PrinterCallback)
        self.watched = watched or self.model
        self.meter = Meter(self.watched)
        self._loss_is_finite: Tensor | bool = True
        self.penalties, self.predictor = penalties, predictor
        self._tokens = 0  # of all processes, since this one began or resumed

    def train(self, resume_from_checkpoint: Path | None = None, **kwargs: Any) -> Any:
        """Train, or only load the weights of a checkpoint after which no step is left."""
        resume = str(resume_from_checkpoint) if resume_from_checkpoint else None
        if resume_from_checkpoint and step_of(resume_from_checkpoint) >= self.args.max_steps:
            # the library would take one step more before it looks at the number of steps
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                self._prepare_for_training(self.args.max_steps, None, resume)
            else:
                self._load_from_checkpoint(str(resume))
            return TrainOutput(self.args.max_steps, 0.0, {"train_runtime": 0.0})
        try:
            return super().train(resume_from_checkpoint=resume, **kwargs)
        finally:
            self.log_callback.close()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            add_up = partial(self.accelerator.reduce, reduction="sum")
            counts = self.meter.read(add_up)
            logs["tokens"] = self.log_callback.tokens + self._tokens
            logs |= counts
            for penalty in self.penalties:
                logs |= penalty.read(add_up)
        super().log(logs, *args, **kwargs)

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        due = _is_logged(self.args, self.state.global_step + 1)
        with self.meter.watch() if due else nullcontext():
            loss = super().training_step(model, inputs, *args, **kwargs)
        self._tokens += inputs["input_ids"].numel() * self.accelerator.num_processes
        self._loss_is_finite = loss.isfinite() & self._loss_is_finite
        return loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The library's, and a group for the predictor, which is no part of the model."""
        optimiser = super().create_optimizer(*args, **kwargs)
        if self.predictor:
            own = self.predictor.parameters()
            optimiser.add_param_group({"params": own, "weight_decay": 0.0})
            # the library clears the gradients of the model alone
            optimiser.register_step_post_hook(lambda *_: self.predictor.clear_gradients())
        return optimiser

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip, and stop the run before an update that is not finite reaches the weights."""
        norm = super()._clip_grad_norm(model)
        for part in self.predictor.parameters() if self.predictor else ():
            part.grad = self.accelerator.reduce(part.grad, "mean")
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if not (self._loss_is_finite and isfinite(norm)):
            raise TurboSparseError(
                f"step {self.state.global_step + 1}: the loss or its gradient is not finite "
                f"(gradient norm {float(norm):g}); give a lower learning_rate than "
                f"{self.args.learning_rate:g} or a lower clip_norm, and the same command resumes "
                "from the last checkpoint"
            )
        return norm

    def create_accelerator_and_postprocess(self) -> None:
        """Set the processes up; refuse where accelerate would silently not shard."""
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and not self.accelerator.is_fsdp2:
            raise TurboSparseError(
                "shard: full was asked for, but on this machine the processes would each hold the "
                f"whole model ({self.accelerator.distributed_type.name}): sharding needs one GPU "
                "for each process; use GPUs, or shard: none"
            )

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.args.fsdp:
            whole = [name for name, p in self.model.named_parameters() if not _is_sharded(p)]
            assert not whole, f"not sharded: {', '.join(whole[:3])}"
        return prepared

    def _load_from_checkpoint(self, checkpoint: str, model: Any = None) -> None:
        """Load the weights; the library would leave out what it does not find, with a warning."""
        if self.is_fsdp_enabled:  # strict: it asks for the tensors of the model
            super()._load_from_checkpoint(checkpoint, model)
        else:
            load_weights(model or self.model, Path(checkpoint))
        if self.predictor:
            self.predictor.load(Path(checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load them, but with the learning rate of the recipe: it may have been lowered."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        schedule, top = self.lr_scheduler, self.args.learning_rate
        schedule.base_lrs = [top] * len(schedule.base_lrs)
        schedule._last_lr = [top * share(schedule.last_epoch) for share in schedule.lr_lambdas]
        for group, rate in zip(self.optimizer.param_groups, schedule._last_lr, strict=True):
            group["initial_lr"], group["lr"] = top, rate

    def _save_checkpoint(self, *args: Any) -> None:
        """Write and seal a checkpoint; one that cannot be written gives its space back.

        Raises:
            TurboSparseError: what the libraries raise here is many types, most of them without the
                system's error number.
        """
        from torch.distributed.checkpoint.api import CheckpointException  # it is a BaseException

        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(*args)
            if self.predictor and self.args.should_save:
                self.predictor.save(folder)
            seal(folder, self.accelerator)
        except BaseException as error:
            free = shutil.disk_usage(folder.parent).free
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            if not isinstance(error, (Exception, CheckpointException)):
                raise
            if isinstance(error, TurboSparseError):
                raise
            text = " ".join(str(error).split())
            raise TurboSparseError(
                f"{folder} cannot be written ({type(error).__name__}: {text}; {free / 1e9:.2f} GB "
                "were free); free some space and give the same command again: it resumes from the "
                "checkpoint before"
            ) from error

    def full_weights(self) -> dict[str, Any] | None:
        """All weights, gathered on the first process; None if the model was never sharded."""
        if self.is_deepspeed_enabled:
            from deepspeed.utils import safe_get_full_fp32_param

            parameters = self.model.named_parameters()
            gathered = ((name, safe_get_full_fp32_param(weight)) for name, weight in parameters)
            return {name: full.cpu() for name, full in gathered if self.args.should_save}
        if not self.args.fsdp:
            return None
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights: dict[str, Any] = get_model_state_dict(self.model, options=options)
        tied = self.model.all_tied_weights_keys  # gathered twice, as two tensors
        return {name: weight for name, weight in weights.items() if name not in tied}

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The library's loss, and the penalties."""
        step = self.state.global_step
        with ExitStack() as stack:
            watched = [
                stack.enter_context(penalty.watch(self.watched, step)) for penalty in self.penalties
            ]
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        for penalty, sums in zip(self.penalties, watched, strict=True):
            added = penalty.of(sums, inputs["labels"], step=step, items=num_items_in_batch)
            if self.args.average_tokens_across_devices:  # the items are those of all processes
                added = added * self.accelerator.num_processes
            loss = loss + added
        return (loss, outputs) if return_outputs else loss


def _is_sharded(parameter: Any) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor) and any(p.is_shard() for p in parameter.placements)


def _is_logged(args: Any, step: int) -> bool:
    """Every few steps, at the end, and at each checkpoint.

    The mean loss of a line then never reaches over a checkpoint, which does not hold half of it: a
    resumed run logs what an unstopped one does.
    """
    often = (args.logging_steps, args.save_steps)
    return step == args.max_steps or any(step % interval == 0 for interval in often)


class _Log(TrainerCallback):
    """Writes the log file and shows the bar, on the first process."""

    def __init__(self, file: Path):
        self.file = file
        self.tokens = 0  # that a stopped run had trained on at its checkpoint
        console = Console(stderr=True)
        self.text = ""
        self.bar = Progress(
            TextColumn("  training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=console,
            disable=not console.is_terminal,
        )

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self._trim(state.global_step)
            self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step)
            self.lines = Lines("training", state.max_steps)
            self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.bar.update(self.task, completed=state.global_step)
            if self.bar.disable:
                self.lines.update(state.global_step, self.text)
        control.should_log |= _is_logged(args, state.global_step)

    def on_log(self, _args: Any, state: Any, _control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if state.is_world_process_zero and "loss" in logs:
            with self.file.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
            self.text = f"loss {logs['loss']:.3f}  sparsity {logs['activation_sparsity']:.1%}"
            self.bar.update(self.task, description=self.text)

    def close(self) -> None:
        """Give the terminal back, also when training failed."""
        if self.bar.live.is_started:
            self.bar.stop()

    def _trim(self, step: int) -> None:
        """Drop what a stopped run logged after the checkpoint that it resumes from."""
        if self.file.is_file():
            lines = self.file.read_text().splitlines(keepends=True)
            # a killed run may leave half a line
            whole = [line for line in lines if line.endswith("\n")]
            kept = [line for line in whole if json.loads(line)["step"] <= step]
            self.tokens = json.loads(kept[-1])["tokens"] if kept else 0
            with new_file(self.file) as work:
                work.write_text("".join(kept))
