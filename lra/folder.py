"""Run folders: what is written before and during training, and how it is read back."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from seqlib.dispatch import used
from seqlib.errors import ConfigError
from seqlib.hf.keep import LOCK
from seqlib.hf.runs import read_json, write_aside

from .data import DataSource, RunData
from .recipes import Recipe

__all__ = ["check_same_data", "describe", "open_plan", "open_run", "read_json", "write_plan"]


def write_plan(folder: Path, recipe: Recipe, source: DataSource, seeds: int) -> None:
    """Write plan.json, from which `--resume` learns what was wanted. A plan alone, of a run that never began, goes."""
    if folder.exists() and {path.name for path in folder.iterdir()} - {"plan.json", LOCK}:
        raise ConfigError(f"{folder} is not empty; continue with --resume {folder}, or give another --output")
    folder.mkdir(parents=True, exist_ok=True)
    plan = {"recipe": recipe.to_dict(), "data": vars(source), "seeds": seeds}
    write_aside(folder / "plan.json", json.dumps(plan, indent=2) + "\n")


def open_plan(folder: Path) -> tuple[Recipe, DataSource, int]:
    """What `write_plan` wrote.

    Raises:
        ConfigError: there is no plan, or one of another version.
    """
    path = folder / "plan.json"
    if not path.is_file():
        raise ConfigError(f"{folder} has no plan.json; give the --output of an earlier train")
    return read_json(path, lambda v: (Recipe.from_dict(v["recipe"]), DataSource(**v["data"]), int(v["seeds"])))


def open_run(folder: Path) -> tuple[Recipe, DataSource, dict[str, Any]]:
    """Recipe, source of the data and everything else that a run folder says about itself."""
    path = folder / "recipe.json"
    if not path.is_file():
        raise ConfigError(f"{folder} is no run folder (it has no recipe.json); give the --output of an earlier train")

    def take(values: Any) -> tuple[Recipe, DataSource, dict[str, Any]]:
        if "task" not in values["recipe"]:
            raise ConfigError(f"{folder} is no run of seqlib-lra: its recipe names no task")
        return Recipe.from_dict(values["recipe"]), DataSource(**values["data"]), values

    return read_json(path, take)


def describe(folder: Path, recipe: Recipe, source: DataSource, data: RunData) -> None:
    """Write recipe.json: what is run, on which data, by which versions and kernels."""
    values = {
        "recipe": recipe.to_dict(),
        "data": vars(source),
        "examples": None if data.task is None else data.task.manifest,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("seqlib", "torch", "transformers", "accelerate")},
        "machine": {
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "backends": used(),
    }
    write_aside(folder / "recipe.json", json.dumps(values, indent=2) + "\n")


def check_same_data(folder: Path, run: Mapping[str, Any], manifest: Mapping[str, Any], remedy: str) -> None:
    """Raise unless `manifest` describes the examples with which a run began.

    Args:
        run: contents of the run's recipe.json.
        remedy: what the user can do, for the error.
    """
    before, now = run["examples"]["splits"], manifest["splits"]
    same = all(facts[key] == now[split][key] for split, facts in before.items() for key in facts.keys() & now[split])
    if not same:
        raise ConfigError(f"the examples are not those with which {folder} was trained: the files changed; {remedy}")
