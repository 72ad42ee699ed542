"""What a run tells while it goes: metrics as JSON lines and a bar in the terminal."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerState

from seqlib.errors import SeqlibError
from seqlib.hf.runs import read_metrics, write_aside

from .recipes import Recipe

__all__ = ["Follow", "Reporter", "is_over"]

_LINE_EVERY = 15.0  # seconds between lines where there is no terminal to draw a bar in


def is_over(state: TrainerState, recipe: Recipe) -> bool:
    """Whether training had ended when the checkpoint was written."""
    solved = any(row.get("eval_accuracy", 0.0) >= recipe.enough for row in state.log_history)
    callbacks: Any = state.stateful_callbacks or {}
    stopping = callbacks.get("EarlyStoppingCallback")
    waited = stopping["attributes"]["early_stopping_patience_counter"] if isinstance(stopping, dict) else 0
    return state.global_step >= recipe.steps or (recipe.enough < 1 and solved) or (0 < recipe.patience <= waited)


class Reporter(TrainerCallback):
    """Appends a JSON line per log to `metrics.jsonl` and stops a run whose loss is no longer a number.

    Keys: step, loss, learning_rate, grad_norm, examples_per_s, data_s (seconds spent waiting for data), elapsed_s;
    lines of evaluations have step and accuracy. On resume, lines after the checkpoint are dropped: they come again.
    """

    def __init__(self, path: Path, examples_per_step: int) -> None:
        self.path, self.examples_per_step = path, examples_per_step
        self.latest: dict[str, Any] = {}
        self.earlier_s = self.busy_s = self.waited_s = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        kept = [row for row in read_metrics(self.path) if row["step"] <= state.global_step]
        write_aside(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        for row in kept:
            self.latest |= row
        self.earlier_s = max((row.get("elapsed_s", 0.0) for row in kept), default=0.0)
        self.first_step, self.begun = state.global_step, time.perf_counter()
        self.ended = self.begun

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.step_begun = time.perf_counter()
        self.waited_s += self.step_begun - self.ended

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ended = time.perf_counter()
        self.busy_s += self.ended - self.step_begun

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        self.ended = time.perf_counter()  # the time of an evaluation is nobody's waiting
        self._add({"step": state.global_step, "accuracy": metrics["eval_accuracy"]})

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ended = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if "loss" not in (logs or {}):
            return
        loss = float(logs["loss"])  # type: ignore[index]
        if not math.isfinite(loss):
            raise SeqlibError(f"the loss is {loss} at step {state.global_step}; lower learning_rate or warm up longer")
        steps = state.global_step - self.first_step
        self._add(
            {
                "step": state.global_step,
                "loss": loss,
                "learning_rate": logs.get("learning_rate"),  # type: ignore[union-attr]
                "grad_norm": logs.get("grad_norm"),  # type: ignore[union-attr]
                "examples_per_s": round(steps * self.examples_per_step / (self.busy_s + self.waited_s), 2),
                "data_s": round(self.waited_s, 3),
                "elapsed_s": round(self.earlier_s + time.perf_counter() - self.begun, 2),
            }
        )

    def _add(self, row: dict[str, Any]) -> None:
        self.latest |= row
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


class Follow(TrainerCallback):
    """A bar in a terminal, lines elsewhere."""

    def __init__(self, reporter: Reporter, console: Console, title: str) -> None:
        self.reporter, self.console, self.title = reporter, console, title
        self.bar: Progress | None = None
        self.last_line = -math.inf

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.console.is_terminal and not self.console.quiet:
            self.bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
                console=self.console,
            )  # fmt: skip
            self.task = self.bar.add_task(self.title, total=state.max_steps, completed=state.global_step, figures="")
            self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        row = self.reporter.latest
        if "loss" not in (logs or {}):
            return
        figures = f"loss {row['loss']:.3f}  {row['examples_per_s']:,.0f} examples/s"
        if "accuracy" in row:
            figures += f"  held-out {100 * row['accuracy']:.1f} %"
        if self.bar:
            self.bar.update(self.task, figures=figures)
        elif time.perf_counter() - self.last_line >= _LINE_EVERY or state.global_step >= state.max_steps:
            self.last_line = time.perf_counter()
            self.console.print(f"{self.title}: step {state.global_step}/{state.max_steps}  {figures}")

    def close(self) -> None:
        """Give the terminal back, also when training ends in an error."""
        if self.bar:
            self.bar.stop()
            self.bar = None
