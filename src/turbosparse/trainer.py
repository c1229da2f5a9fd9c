"""The Hugging Face Trainer, with activation sparsity in whatever it logs and one progress bar."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
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

from turbosparse.folders import new_file
from turbosparse.hf.observe import observe_ffn
from turbosparse.objectives import Objectives


class SparsityMeter:
    """Share of exact zeros in Combined per layer, over the forward passes that it watched."""

    def __init__(self) -> None:
        self._zeros: dict[int, int] = {}
        self._entries: dict[int, int] = {}

    @contextmanager
    def watch(self, model: Any) -> Iterator[None]:
        def see(
            layer: int, _expert: int | None, _gate: Tensor, combined: Tensor, _: Tensor
        ) -> None:
            zeros = combined.numel() - int(combined.count_nonzero())
            self._zeros[layer] = self._zeros.get(layer, 0) + zeros
            self._entries[layer] = self._entries.get(layer, 0) + combined.numel()

        with observe_ffn(model, see):
            yield

    def read(self) -> dict[str, float]:
        """The mean over layers and each layer's value; then start anew."""
        layers = [self._zeros[i] / self._entries[i] for i in sorted(self._entries)]
        self._zeros, self._entries = {}, {}
        named = {f"sparsity/layer_{i:02}": value for i, value in enumerate(layers)}
        return {"activation_sparsity": sum(layers) / max(1, len(layers))} | named


class SparseTrainer(Trainer):
    """Measures sparsity in the steps that it logs, and keeps the log as JSON lines."""

    def __init__(self, *, log_file: Path, objectives: Objectives, **arguments: Any):
        self.log_callback = _Log(log_file)
        super().__init__(**arguments, callbacks=[self.log_callback])
        self.remove_callback(PrinterCallback)
        self.meter = SparsityMeter()
        self.objectives = objectives
        if self.args.gradient_checkpointing and (objectives.l1 or objectives.staged_steps):
            # layers would be run again for their gradients without what these two change in them
            raise ValueError("l1 and staged_steps do not go with gradient checkpointing")
        if objectives.teacher is not None:
            objectives.teacher = self.accelerator.prepare_model(
                objectives.teacher, evaluation_mode=True
            )

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """Train, or only load the weights of a checkpoint after which no step is left."""
        if resume_from_checkpoint and _step_of(resume_from_checkpoint) >= self.args.max_steps:
            # the library would take one step more before it looks at the number of steps
            self._load_from_checkpoint(resume_from_checkpoint)
            return TrainOutput(self.args.max_steps, 0.0, {"train_runtime": 0.0})
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            self.log_callback.close()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs |= self.meter.read() | self.objectives.read()
        super().log(logs, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        due = _is_logged(self.args, self.state.global_step + 1)
        with self.meter.watch(self.accelerator.unwrap_model(self.model)) if due else nullcontext():
            return super().training_step(*args, **kwargs)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The library's loss, and what the recipe adds to it."""
        if not self.objectives:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        step = self.state.global_step
        with self.objectives.watch(self.accelerator.unwrap_model(model), step) as norms:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        extra = self.objectives.extra(
            inputs, outputs.logits, norms, step=step, items=num_items_in_batch
        )
        if self.args.average_tokens_across_devices:  # the items are those of all processes
            extra = extra * self.accelerator.num_processes
        return (loss + extra, outputs) if return_outputs else loss + extra


def _is_logged(args: Any, step: int) -> bool:
    """Every so many steps, at the end, and at each checkpoint.

    The mean loss of a line then never reaches over a checkpoint, which does not hold half of it: a
    resumed run logs what an unstopped one does.
    """
    often = (args.logging_steps, args.save_steps)
    return step == args.max_steps or any(step % interval == 0 for interval in often)


def _step_of(checkpoint: str) -> int:
    return int(Path(checkpoint).name.split("-")[1])


class _Log(TrainerCallback):
    """Writes the log file and shows the bar, on the first process."""

    def __init__(self, file: Path):
        self.file = file
        self.bar = Progress(
            TextColumn("  training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=Console(stderr=True),
        )

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self._trim(state.global_step)
            self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step)
            self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.bar.update(self.task, completed=state.global_step)
        control.should_log |= _is_logged(args, state.global_step)

    def on_log(self, _args: Any, state: Any, _control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if state.is_world_process_zero and "loss" in logs:
            with self.file.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
            text = f"loss {logs['loss']:.3f}  sparsity {logs['activation_sparsity']:.1%}"
            self.bar.update(self.task, description=text)

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
            with new_file(self.file) as work:
                work.write_text("".join(line for line in whole if json.loads(line)["step"] <= step))
