"""From local files, an archive or a generator to prepared examples in the cache."""

from __future__ import annotations

import tarfile
import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from seqlib.errors import ConfigError, CorpusError

from .protocols import get_protocol
from .store import SPLITS, Examples, cache_folder, fingerprint, load, save
from .tasks import Task, TaskData, get_task
from .tasks.base import NotHere, Prepared, check_counts

__all__ = ["open_archive", "prepare"]

VERSION = 3  # of generators and readers; a change of what they give must raise it
_INNER = ("", "lra_release", "lra_release/lra_release")
_MEMBERS = {
    "listops": "listops-1000/",
    "retrieval": "tsv_data/new_aan_pairs.",
    "pathfinder": "pathfinder32/curv_contour_length_14/",
    "pathx": "pathfinder128/curv_contour_length_14/",
    "pathfinder256": "pathfinder256/curv_contour_length_14/",
}
"""What the released archive calls the files of a task."""


def prepare(
    task: Task | str,
    protocol: str = "seqlib",
    *,
    data: Path | None = None,
    generate: Mapping[str, Any] | None = None,
    seed: int = 0,
    any_size: bool = False,
    cache: Path | None = None,
    processes: int = 1,
) -> TaskData:
    """Examples of a task, from the cache if they were prepared before.

    Args:
        data: folder or archive with the files of the task; None: the data set by name, or what is cached.
        generate: make the examples here instead, with these options changed (`Task.generates`).
        any_size: accept splits of other sizes than the published ones.

    Raises:
        ConfigError: options that do not exist.
        CorpusError: files that are missing or damaged; nothing is then written.
    """
    task = get_task(task) if isinstance(task, str) else task
    rules = get_protocol(protocol)
    key: dict[str, Any] = {"version": VERSION, "task": task.name, "protocol": asdict(rules)}
    if generate is not None:
        unknown = sorted(generate.keys() - task.generates.keys())
        if unknown:
            known = ", ".join(task.generates) or "none: this task needs files"
            raise ConfigError(f"{task.name} has no option {', '.join(unknown)} to generate with; known: {known}")
        options = {**task.generates, **generate}
        key |= {"generated": options, "seed": seed}
    else:
        key |= {"data": str(data.resolve()) if data else None}
    folder = cache_folder(cache) / f"{task.name}-{fingerprint(key)}"
    found = load(folder)
    if found is None:
        if generate is not None:
            made = task.generate(options, seed, processes)
        else:
            made = _read(task, rules.name, data)
            if not any_size:
                check_counts(task.sizes(rules), made.splits, data or Path(task.name))
        save(folder, made.splits, key | _manifest(task, made))
        found = load(folder)
        if found is None:
            raise CorpusError(f"{folder} could not be written")
    return TaskData(task, found[0], found[1])


def _read(task: Task, protocol: str, data: Path | None) -> Prepared:
    rules = get_protocol(protocol)
    if data is None:
        return task.read(Path(), rules)
    if data.is_file():
        with tempfile.TemporaryDirectory(prefix="seqlib-lra-") as aside:
            open_archive(data, Path(aside), _MEMBERS.get(task.name))
            return _within(task, Path(aside), rules)
    if not data.is_dir():
        raise CorpusError(f"{data} does not exist; {task.title} needs {task.where}")
    return _within(task, data, rules)


def _within(task: Task, root: Path, rules: Any) -> Prepared:
    """Read from the first inner folder that has something of the task."""
    for inner in _INNER:
        try:
            return task.read(root / inner, rules)
        except NotHere:
            continue
    raise task.missing(root)


def open_archive(path: Path, into: Path, member: str | None) -> None:
    """Unpack what belongs to a task.

    Args:
        member: part of the names to unpack; None for all.

    Raises:
        CorpusError: no archive, or one that is cut off.
    """
    try:
        with tarfile.open(path) as archive:
            for entry in archive:
                if member is None or member in entry.name:
                    archive.extract(entry, into, filter="data")
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise CorpusError(f"{path} is cut off or no tar archive ({error}); download it again") from error


def _manifest(task: Task, made: Prepared) -> dict[str, Any]:
    return {
        "vocab_size": made.vocab_size,
        "pad": made.pad,
        "facts": made.facts,
        "splits": {name: _statistics(made.splits[name], task.classes) for name in SPLITS},
    }


def _statistics(part: Examples, classes: int) -> dict[str, Any]:
    lengths = part.lengths
    return {
        "examples": len(part),
        "labels": np.bincount(part.labels, minlength=classes).tolist(),
        "lengths": {str(q): int(np.quantile(lengths, q)) for q in (0, 0.1, 0.5, 0.9, 1)},
        "mean_length": round(float(lengths.mean()), 1),
    }
