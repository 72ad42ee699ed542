"""Charts of runs, comparisons, the suite and the leaderboard: plain numbers on the axes, trivial answers drawn."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from seqlib.hf.runs import read_metrics, save_figure

from .scores import COLUMNS, TITLES, Row

__all__ = ["plot_comparison", "plot_curve", "plot_leaderboard", "plot_length", "plot_state"]

_APART = 0.18  # of a logarithmic axis between two of its numbers, at least
_TRIVIAL: dict[str, Any] = {"color": "gray", "linewidth": 0.8, "linestyle": "--"}


def plot_curve(metrics: Path, png: Path, baselines: Mapping[str, float]) -> None:
    """Training loss and held-out accuracy over steps, with the trivial baselines; a panel for what was measured."""
    rows = read_metrics(metrics)
    losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    scores = [(row["step"], 100 * row["accuracy"]) for row in rows if "accuracy" in row]
    count = bool(losses) + bool(scores)
    if not count:
        return
    figure = _figure((4 * count, 4))
    panels = iter(figure.subplots(1, count, squeeze=False)[0])
    if losses:
        panel = next(panels)
        panel.plot(*zip(*losses), color="tab:blue")
        panel.set(xlabel="step", ylabel="training loss (nats)")
    if scores:
        panel = next(panels)
        panel.plot(*zip(*scores), "o-", color="tab:orange", markersize=3)
        _draw_trivial(panel, baselines)
        panel.set(xlabel="step", ylabel="held-out accuracy (%)", ylim=(0, 101))
    save_figure(figure, png)


def plot_comparison(found: dict[str, Any], path: Path) -> None:
    """A bar for each run's test accuracy, with its interval or deviation, and a line for each trivial answer."""
    rows = found["comparison"][::-1]
    figure = _figure((8, 1.2 + 0.35 * len(rows)))
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
        axes.axvline(100 * value, **_TRIVIAL)
        axes.annotate(name, (100 * value, 1), xycoords=("data", "axes fraction"), fontsize=6, rotation=45)
    axes.set(xlabel="test accuracy (%)", xlim=(0, 100))
    save_figure(figure, path)


def plot_leaderboard(published: Mapping[str, Sequence[Row]], ours: Sequence[Mapping[str, Any]], png: Path) -> None:
    """A panel per task: published scores by group as dots, our runs as lines across with their deviation.

    Runs on reduced data are dashed and say so: they are no rivals of the dots.
    """
    dots = {task: {group: _scores(part, task) for group, part in published.items()} for task in COLUMNS}
    shown = [task for task in COLUMNS if any(dots[task].values()) or any(own["task"] == task for own in ours)]
    figure = _figure((2.5 * len(shown), 3.6))
    for panel, task in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown):
        for at, values in enumerate(dots[task].values()):
            panel.plot([at] * len(values), values, "o", alpha=0.5, markersize=4, color=f"C{at}")
        for number, row in enumerate(own for own in ours if own["task"] == task):
            mean, std = 100 * row["mean"], 100 * (row["std"] or 0.0)
            kinds = ",".join(str(m.get("kind")) for m in row["mixers"].values())
            style, mark = ("--", ", reduced data") if row["reduced"] else ("-", "")
            panel.axhline(mean, color=f"C{3 + number}", linestyle=style, label=f"{kinds} ({row['recipe']}{mark})")
            panel.axhspan(mean - std, mean + std, color=f"C{3 + number}", alpha=0.2)
        if any(own["task"] == task for own in ours):
            panel.legend(fontsize=6)
        panel.set(title=TITLES[COLUMNS.index(task)], xlim=(-0.5, len(published) - 0.5))
        panel.set_xticks(range(len(published)), list(published))
    figure.supylabel("accuracy (%)")
    save_figure(figure, png)


def _scores(part: Sequence[Row], task: str) -> list[float]:
    return [score for score in (row.scores[task] for row in part) if score is not None]


def plot_state(rows: Sequence[Mapping[str, Any]], png: Path) -> None:
    """Accuracy against the size of the state, one panel per trial."""
    _panels(rows, png, "state (bytes)", lambda row: [(row["state_bytes"], row["accuracy"])], "o")


def plot_length(rows: Sequence[Mapping[str, Any]], png: Path) -> None:
    """Accuracy against the length of the sequence, one panel per trial."""
    _panels(rows, png, "sequence length", lambda row: [(int(k), v) for k, v in row["by_length"].items()], "o-")


def _panels(rows: Sequence[Mapping[str, Any]], png: Path, label: str, points: Any, style: str) -> None:
    trials = [trial for trial in dict.fromkeys(row["trial"] for row in rows)
              if any(points(row) for row in rows if row["trial"] == trial)]  # fmt: skip
    if not trials:
        return
    mixers = list(dict.fromkeys(row["mixer"] for row in rows))
    figure = _figure((3.2 * len(trials) + 1, 3.2))
    panels = figure.subplots(1, len(trials), squeeze=False)[0]
    for panel, trial in zip(panels, trials):
        here = [row for row in rows if row["trial"] == trial]
        for color, mixer in enumerate(mixers):
            own = [points(row) for row in here if row["mixer"] == mixer]
            where = sorted({x for run in own for x, _ in run})
            means = [statistics.fmean(y for run in own for at, y in run if at == x) for x in where]
            panel.plot(where, [100 * y for y in means], style, color=f"C{color % 10}", label=mixer, markersize=4)
        _draw_trivial(panel, here[0]["baselines"])
        panel.set(title=trial, xlabel=label, ylim=(0, 102), xscale="log")
        _plain_ticks(panel.xaxis, sorted({x for row in here for x, _ in points(row)}))
    panels[0].set_ylabel("accuracy (%)")
    panels[-1].legend(fontsize=6)
    save_figure(figure, png)


def _figure(size: tuple[float, float]) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def _draw_trivial(panel: Any, baselines: Mapping[str, float]) -> None:
    """A line for what each answer without a sequence model scores."""
    for name, value in baselines.items():
        panel.axhline(100 * value, **_TRIVIAL)
        panel.annotate(name, (0.02, 100 * value), xycoords=("axes fraction", "data"), fontsize=6, va="bottom")


def _plain_ticks(axis: Any, values: Sequence[int]) -> None:
    """Label a logarithmic axis with some of the values that occur, as numbers and not as powers."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    span = math.log(values[-1] / values[0]) if values else 0.0
    shown = [values[0]] if values else []
    for value in values[1:]:
        if math.log(value / shown[-1]) >= _APART * span:
            shown.append(value)
    axis.set_major_locator(FixedLocator(shown))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.set_tick_params(labelsize=7)
