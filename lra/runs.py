"""Run folders: recipes changed by settings, metrics as JSON lines, a bar in the terminal, a plot."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

from seqlib.errors import ConfigError, SeqlibError

__all__ = ["Follow", "Reporter", "override", "plot_curve", "read_metrics", "write_aside"]

_LINE_EVERY = 15.0  # seconds between lines where there is no terminal to draw a bar in
R = TypeVar("R")


def write_aside(path: Path, text: str) -> None:
    """Write a small file so that a reader finds the old content or the new one, never a part."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    os.replace(part, path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, without one that a kill cut off."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def override(recipe: R, settings: Sequence[str]) -> R:
    """The recipe with `key=value` settings; dots reach into its dicts ("mixers.m.d_state=16", "data.pairs=16").

    Values are read as JSON where they can be and as text otherwise, and must have the type of the field.

    Raises:
        ConfigError: an unknown field, or a value that does not fit it.
    """
    types = get_type_hints(type(recipe))
    changes: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        name, *path = key.strip().split(".")
        if not equals or name not in types:
            near = difflib.get_close_matches(name, types, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(types)}"
            raise ConfigError(f"--set takes FIELD=VALUE, got {setting!r}{hint}")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = {"True": True, "False": False, "None": None}.get(text, text)
        if path:
            value = _replaced(key, changes.get(name, getattr(recipe, name)), path, value)
        now = getattr(recipe, name)
        if isinstance(now, float) and type(value) is int:
            value = float(value)
        if (
            now is not None
            and value is not None
            and not isinstance(value, Mapping if isinstance(now, Mapping) else type(now))
        ):
            raise ConfigError(f"--set {key}: {text!r} is not of type {type(now).__name__}")
        changes[name] = value
    return dataclasses.replace(recipe, **changes)  # type: ignore[type-var]


def _replaced(key: str, tree: Any, path: list[str], value: Any) -> dict[str, Any]:
    if tree is not None and not isinstance(tree, Mapping):
        raise ConfigError(f"--set {key}: {key.split('.', maxsplit=1)[0]} has no parts to set")
    copy = dict(tree or {})
    copy[path[0]] = value if len(path) == 1 else _replaced(key, copy.get(path[0]), path[1:], value)
    return copy


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


def plot_curve(metrics: Path, png: Path, baselines: Mapping[str, float]) -> None:
    """Training loss and held-out accuracy over steps, with the trivial baselines."""
    from matplotlib.figure import Figure

    rows = read_metrics(metrics)
    losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    scores = [(row["step"], 100 * row["accuracy"]) for row in rows if "accuracy" in row]
    if not losses or not scores:
        return
    figure = Figure(figsize=(8, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(*zip(*losses), color="tab:blue")
    left.set(xlabel="step", ylabel="training loss (nats)")
    right.plot(*zip(*scores), "o-", color="tab:orange", markersize=3)
    for name, value in baselines.items():
        right.axhline(100 * value, color="gray", linewidth=0.8, linestyle="--")
        right.annotate(name, (0.02, 100 * value), xycoords=("axes fraction", "data"), fontsize=6, va="bottom")
    right.set(xlabel="step", ylabel="held-out accuracy (%)", ylim=(0, 101))
    part = png.with_name(f".{png.name}.part")
    figure.savefig(part, format="png", dpi=130)
    os.replace(part, png)
