"""What the command line prints of data, baselines, seeds, tasks and recipes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from .protocols import PROTOCOLS
from .recall import RECALL
from .recipes import Recipe, find_recipe, recipe_names
from .store import SPLITS
from .tasks import TASKS, TaskData

__all__ = [
    "baselines_table", "examples_table", "recipe_table", "recipes_table", "summary_table", "task_lines", "tasks_table",
]  # fmt: skip


def examples_table(found: TaskData) -> Table:
    """Sizes, labels and lengths of the splits."""
    shown = Table("split", "examples", "mean length", "longest", "labels (%)", title=found.task.title)
    for split in SPLITS:
        facts = found.manifest["splits"][split]
        shares = " ".join(f"{100 * n / facts['examples']:.1f}" for n in facts["labels"])
        shown.add_row(
            split, f"{facts['examples']:,}", f"{facts['mean_length']:,}", f"{facts['lengths']['1']:,}", shares
        )
    return shown


def baselines_table(found: dict[str, float]) -> Table:
    shown = Table("answers without a sequence model", "test accuracy (%)")
    for name, value in found.items():
        shown.add_row(name, f"{100 * value:.1f}")
    return shown


def summary_table(summary: dict[str, Any]) -> Table:
    """Score over seeds and its gain over every trivial answer."""
    mean, std = 100 * summary["mean"], summary["std"]
    spread = f" ± {100 * std:.2f} ({len(summary['seeds'])} seeds)" if std is not None else ""
    interval = summary["interval"]
    if interval:
        spread = f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f}, 95 %)"
    title = f"{summary['task']}, {summary['layer_pattern']} {summary['mixers']}"
    shown = Table("", "test accuracy (%)", "gain", title=escape(title))
    shown.add_row("this model", f"{mean:.2f}{spread}", "")
    for name, value in summary["baselines"].items():
        shown.add_row(name, f"{100 * value:.1f}", f"{mean - 100 * value:+.1f}")
    notes = [f"reduced data: {summary['reduced']}"] if summary.get("reduced") else []
    if summary["failed_seeds"]:
        notes.append(f"seeds that learnt nothing: {', '.join(map(str, summary['failed_seeds']))}")
    shown.caption = "; ".join(notes) or None
    return shown


def tasks_table() -> Table:
    """Every task with its options, where its examples come from, and how many recipes it has."""
    shown = Table("task", "what it asks, and options with their defaults", "examples", "recipes", box=box.SIMPLE_HEAD)
    for name, task in TASKS.items():
        made = "files or --generate" if task.generates else "files or `datasets`" if task.hub else "files"
        shown.add_row(name, _asked(type(task).__doc__, task.generates), made, str(len(recipe_names(name))))
    for name, recall in RECALL.items():
        asked = _asked(recall.make.__doc__, recall.defaults)
        shown.add_row(name, asked, "made while training", str(len(recipe_names(name))))
    shown.caption = (
        "where files come from: seqlib-lra tasks TASK; recipes: seqlib-lra recipes TASK\n"
        "options: prepare --generate --set NAME=VALUE, train --set data.NAME=VALUE"
    )
    return shown


def task_lines(name: str) -> list[str]:
    """Everything there is to say about one task, a line each."""
    recipes = f"recipes: {', '.join(recipe_names(name)) or 'none'}"
    if name in RECALL:
        recall = RECALL[name]
        return [f"{name}: {_asked(recall.make.__doc__, recall.defaults)}", "examples: made while training", recipes]
    task = TASKS[name]
    sizes = ", ".join(f"{split} {count:,}" for split, count in task.counts.items())
    return [
        f"{name}: {_asked(type(task).__doc__, task.generates)}", f"examples: {task.where}", f"published sizes: {sizes}",
        f"protocols: {', '.join(PROTOCOLS)}", recipes,
    ]  # fmt: skip


def recipes_table(task: str | None) -> Table:
    """Every recipe, for one task or for all."""
    shown = Table("task", "recipe", "protocol", "mixers", "layers", "d_model", "batch", "steps", box=box.SIMPLE_HEAD)
    for column in shown.columns:
        column.overflow = "fold"
    shown.padding = (0, 1, 0, 0)
    for name in [task] if task else [*TASKS, *RECALL]:
        for recipe in (find_recipe(known, name) for known in recipe_names(name)):
            kinds = " ".join(str(mixer["kind"]) for mixer in recipe.mixers.values())
            protocol = recipe.protocol if name in TASKS else "-"
            sizes = (recipe.n_layer, recipe.d_model, recipe.batch_size)
            shown.add_row(name, recipe.name, protocol, kinds, *map(str, sizes), f"{recipe.steps:,}")
    shown.caption = "every field of one recipe: seqlib-lra recipes TASK RECIPE"
    return shown


def recipe_table(recipe: Recipe) -> Table:
    """Every field of a recipe with its value, as --set takes it."""
    shown = Table("field", "value", title=f"{recipe.name} for {recipe.task}", box=box.SIMPLE_HEAD)
    for field in dataclasses.fields(recipe):
        shown.add_row(field.name, escape(str(getattr(recipe, field.name))))
    return shown


def _asked(doc: str | None, options: Mapping[str, Any]) -> str:
    """The first line of a docstring, and the options with their defaults."""
    asked = (doc or "").strip().split("\n")[0].rstrip(".").replace("`", "")
    return asked + (": " + ", ".join(f"{name}={default}" for name, default in options.items()) if options else "")
