"""Finished runs of one recipe with different mixers, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from seqlib.errors import ConfigError
from seqlib.hf.runs import save_figure

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


def plot_comparison(found: dict[str, Any], path: Path) -> None:
    """A bar for each run's test accuracy, with its interval or deviation, and a line for each trivial answer."""
    from matplotlib.figure import Figure

    rows = found["comparison"][::-1]
    figure = Figure(figsize=(8, 1.2 + 0.35 * len(rows)), layout="constrained")
    axes = figure.subplots()
    means = [row["mean"] for row in rows]
    around = [row["interval"] if row["std"] is None else (row["mean"] - row["std"], row["mean"] + row["std"])
              for row in rows]  # fmt: skip
    below = [100 * (mean - low) for mean, (low, _) in zip(means, around)]
    above = [100 * (high - mean) for mean, (_, high) in zip(means, around)]
    names = [" ".join(mixer["kind"] for mixer in row["mixers"].values()) for row in rows]
    axes.barh(range(len(rows)), [100 * mean for mean in means], xerr=(below, above), capsize=2)
    axes.set_yticks(range(len(rows)), names)
    for name, value in found["baselines"].items():
        axes.axvline(100 * value, color="gray", linewidth=0.8, linestyle="--")
        axes.annotate(name, (100 * value, 1), xycoords=("data", "axes fraction"), fontsize=6, rotation=45)
    axes.set(xlabel="test accuracy (%)", xlim=(0, 100))
    save_figure(figure, path)
