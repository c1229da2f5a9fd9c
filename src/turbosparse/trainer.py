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

from turbosparse.hf.observe import observe_ffn


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


class SparseTrainer(Trainer):  # type: ignore[misc]
    """A Trainer that measures sparsity in the steps that it logs, and keeps the log as JSON lines."""

    def __init__(self, *, log_file: Path, **arguments: Any):
        super().__init__(**arguments, callbacks=[_Log(log_file)])
        self.remove_callback(PrinterCallback)
        self.meter = SparsityMeter()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs |= self.meter.read()
        super().log(logs, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        step = self.state.global_step + 1
        due = step % self.args.logging_steps == 0 or step == self.args.max_steps
        with self.meter.watch(self.accelerator.unwrap_model(self.model)) if due else nullcontext():
            return super().training_step(*args, **kwargs)


class _Log(TrainerCallback):  # type: ignore[misc]
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

    def on_step_end(self, _args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.bar.update(self.task, completed=state.global_step)
        control.should_log |= state.global_step == state.max_steps

    def on_log(self, _args: Any, state: Any, _control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if state.is_world_process_zero and "loss" in logs:
            with self.file.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
            text = f"loss {logs['loss']:.3f}  sparsity {logs['activation_sparsity']:.1%}"
            self.bar.update(self.task, description=text)

    def on_train_end(self, _args: Any, _state: Any, _control: Any, **_: Any) -> None:
        self.bar.stop()

    def _trim(self, step: int) -> None:
        """Drop what a stopped run logged after the checkpoint that it resumes from."""
        if self.file.is_file():
            lines = self.file.read_text().splitlines(keepends=True)
            self.file.write_text(
                "".join(line for line in lines if json.loads(line)["step"] <= step)
            )
