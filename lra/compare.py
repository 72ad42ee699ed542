"""Finished runs of one recipe with different mixers, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from seqlib.errors import ConfigError

from .charts import plot_comparison
from .folder import open_plan, open_run
from .leaderboard import own_rows

__all__ = ["compare_runs", "plot_comparison", "show_comparison"]

_MIXER = ("mixers", "layer_pattern")


def compare_runs(folders: Sequence[Path]) -> dict[str, Any]:
    """What runs scored that differ in nothing but their mixers.

    Args:
        folders: outputs of `seqlib-lra train`, finished.

    Returns:
        For JSON: the common recipe, what trivial answers score, the machine, and a row per folder.

    Raises:
        ConfigError: a folder is not finished, or its recipe differs in more than the mixers.
    """
    summaries = own_rows(folders)
    recipes = [open_plan(folder)[0].to_dict() for folder in folders]
    common = {key: value for key, value in recipes[0].items() if key not in _MIXER}
    for folder, recipe in zip(folders, recipes):
        different = sorted(key for key, value in common.items() if recipe[key] != value)
        if different:
            raise ConfigError(f"{folder} was trained otherwise than {folders[0]}: it differs in {', '.join(different)}")
    for folder, summary in zip(folders, summaries):
        if summary["data"] != summaries[0]["data"]:
            raise ConfigError(
                f"{folder} and {folders[0]} were trained and scored on different examples; compare cannot rank them"
            )
    kept = ("mixers", "layer_pattern", "seeds", "accuracies", "mean", "std", "interval", "steps", "seconds",
            "parameters", "state_bytes", "failed_seeds")  # fmt: skip
    rows = [{key: summary[key] for key in kept} for summary in summaries]
    _, _, run = open_run(folders[0] / f"seed-{rows[0]['seeds'][0]}")
    facts = {"baselines": summaries[0]["baselines"], "versions": run["versions"], "threads": run["machine"]["threads"]}
    return {"recipe": common, **facts, "comparison": sorted(rows, key=lambda row: -row["mean"])}


def show_comparison(found: dict[str, Any], console: Console) -> None:
    """Print what `compare_runs` found."""
    table = Table("mixer", "test accuracy (%)", "steps", "seconds", "parameters", title=found["recipe"]["task"])
    for row in found["comparison"]:
        kinds = " ".join(mixer["kind"] for mixer in row["mixers"].values())
        table.add_row(
            kinds, f"{100 * row['mean']:.1f}", f"{max(row['steps'])}", f"{row['seconds']:.0f}", f"{row['parameters']:,}"
        )
    table.caption = ", ".join(f"{name} {100 * value:.1f}" for name, value in found["baselines"].items())
    console.print(table)
