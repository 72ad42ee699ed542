"""The published leaderboard beside our own runs, as text, Markdown, JSON and a chart."""

from __future__ import annotations

import io
import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from seqlib.errors import ConfigError
from seqlib.hf.runs import write_aside

from .charts import plot_leaderboard
from .data import reduced
from .folder import open_run, read_json
from .scores import COLUMNS, GROUPS, TITLES, Row, rows

__all__ = ["own_rows", "show"]

_NEEDED = ("task", "seeds", "protocol", "recipe", "mixers", "layer_pattern", "data", "baselines", "mean", "std",
           "accuracies", "interval", "steps", "seconds", "parameters", "state_bytes", "failed_seeds")  # fmt: skip
_WIDE = 140  # columns of the files, and of terminals that have them


def show(runs: Sequence[Path], group: str | None, output: Path | None, console: Console) -> None:
    """Print the leaderboard, and write it into `output` as table.txt, table.md, table.json and table.png.

    Raises:
        ConfigError: an unknown group, or a folder without a summary.
    """
    if group is not None and group not in GROUPS:
        raise ConfigError(f"unknown group {group!r}; known: {', '.join(GROUPS)}")
    groups = [group] if group else list(GROUPS)
    published = {name: rows(name) for name in groups}
    ours = own_rows(runs)
    _print(console, published, ours)
    if output is None:
        return
    output.mkdir(parents=True, exist_ok=True)
    text = Console(file=io.StringIO(), width=_WIDE)
    _print(text, published, ours)
    write_aside(output / "table.txt", text.file.getvalue())  # type: ignore[attr-defined]
    write_aside(output / "table.md", markdown(published, ours))
    plain = {name: [_plain(row) for row in part] for name, part in published.items()}
    values = {"groups": {name: GROUPS[name] for name in groups}, "published": plain, "ours": ours}
    write_aside(output / "table.json", json.dumps(values, indent=2) + "\n")
    plot_leaderboard(published, ours, output / "table.png")
    console.print(f"written to {output}", markup=False)


def _print(console: Console, published: dict[str, list[Row]], ours: Sequence[dict[str, Any]]) -> None:
    for name, part in published.items():
        console.print(_table(name, part) if console.width >= _WIDE else _narrow_table(name, part))
    if ours:
        console.print(_own_table(ours))


def own_rows(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Our runs, one row per recipe, protocol, data and mixer; runs that differ in any of them are never averaged.

    Raises:
        ConfigError: a folder has no summary.json.
    """
    found = []
    for folder in folders:
        path = folder / "summary.json"
        if not path.is_file():
            raise ConfigError(f"{folder} has no summary.json; give folders that seqlib-lra train has finished")
        summary = read_json(path, lambda values: {key: values[key] for key in _NEEDED} | values)
        if summary.get("reduced") is None:  # an early version did not say
            summary["reduced"] = _reduced(folder, summary)
        found.append(summary | {"folder": folder.name})
    return found


def _reduced(folder: Path, summary: dict[str, Any]) -> str:
    examples = open_run(folder / f"seed-{summary['seeds'][0]}")[2]["examples"]
    return "" if examples is None else reduced(summary["task"], examples)


def _plain(row: Row) -> dict[str, Any]:
    return vars(row) | {"average_of_what_ran": row.average(False), "average_failed_as_50": row.average(True)}


def _cell(row: Row, task: str) -> str:
    value = row.scores[task]
    return "F" if task in row.failed else "-" if value is None else f"{value:.2f}"


def _average(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _cells(row: Row) -> list[str]:
    return [
        row.model, *(_cell(row, task) for task in COLUMNS), _average(row.average(False)), _average(row.average(True)),
        _average(row.published_average), row.source,
    ]  # fmt: skip


_HEADER = ("model", *TITLES, "average", "F as 50", "published", "source (?: unverified)")


_SHORT = ("List", "Text", "Retr", "Image", "Path", "PathX", "avg", "F=50")


def _table(name: str, part: Sequence[Row]) -> Table:
    table = Table(*_HEADER, box=box.SIMPLE_HEAD, title=f"{name}: {GROUPS[name]}")
    for row in part:
        table.add_row(*_cells(row))
    return table


def _narrow_table(name: str, part: Sequence[Row]) -> Table:
    """The same for 80 columns: short titles, sources by letter below."""
    sources = list(dict.fromkeys(row.source for row in part))
    letters = dict(zip(sources, string.ascii_lowercase))
    table = Table(box=box.SIMPLE_HEAD, title=f"{name}: {GROUPS[name]}", padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("model", overflow="fold")
    for title in (*_SHORT, ""):
        table.add_column(title, no_wrap=True, justify="right" if title else "left")
    for row in part:
        cells = _cells(row)
        table.add_row(*cells[: 1 + len(_SHORT)], letters[row.source])
    table.caption = "; ".join(f"{letter}: {source}" for source, letter in letters.items())
    return table


_OWN_HEADER = ("run", "task", "data", "mixers", "test accuracy", "seeds", "failed", "gain over best trivial answer")


def _own_cells(row: dict[str, Any]) -> list[str]:
    spread = f" ± {100 * row['std']:.2f}" if row["std"] is not None else ""
    best = max(row["baselines"].items(), key=lambda item: item[1], default=("nothing", 0.0))
    trivial = [(k, v) for k, v in row["baselines"].items() if not k.startswith("lists to depth") or k.endswith(" 1")]
    best = max(trivial, key=lambda item: item[1], default=best)
    return [
        f"{row['folder']} ({row['recipe']})", row["task"] + ("*" if row["reduced"] else ""), _data(row),
        ", ".join(str(m.get("kind")) for m in row["mixers"].values()), f"{100 * row['mean']:.2f}{spread}",
        str(len(row["seeds"])), str(len(row["failed_seeds"])), f"{100 * (row['mean'] - best[1]):+.1f} ({best[0]})",
    ]  # fmt: skip


def _data(row: dict[str, Any]) -> str:
    """Protocol and size of the examples of a run."""
    if row["protocol"] is None:
        return "made while training"
    return f"{row['protocol']}, {'reduced: ' + row['reduced'] if row['reduced'] else 'as published'}"


_REDUCED = "*: easier or smaller than the published data, so no rival of the published scores"


def _own_table(ours: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="our runs", padding=(0, 1, 0, 0), pad_edge=False)
    for title in _OWN_HEADER:
        table.add_column(title, overflow="fold", no_wrap=title in ("task", "test accuracy", "seeds", "failed"))
    for row in ours:
        table.add_row(*map(escape, _own_cells(row)))
    if any(row["reduced"] for row in ours):
        table.caption = _REDUCED
    return table


def markdown(published: dict[str, list[Row]], ours: Sequence[dict[str, Any]]) -> str:
    """All tables in Markdown."""
    parts = []
    for name, part in published.items():
        lines = [_HEADER, ("---",) * len(_HEADER), *(_cells(row) for row in part)]
        parts.append(f"### {name}: {GROUPS[name]}\n\n" + "\n".join("| " + " | ".join(cells) + " |" for cells in lines))
    if ours:
        lines = [_OWN_HEADER, ("---",) * len(_OWN_HEADER), *(_own_cells(row) for row in ours)]
        parts.append("### our runs\n\n" + "\n".join("| " + " | ".join(cells) + " |" for cells in lines))
        if any(row["reduced"] for row in ours):
            parts.append(_REDUCED.replace("*", r"\*", 1))
    return "\n\n".join(parts) + "\n"
