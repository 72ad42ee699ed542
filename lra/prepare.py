"""From local files, an archive or a generator to prepared examples in the cache."""

from __future__ import annotations

import os
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from seqlib.errors import ConfigError, CorpusError

from .options import complete
from .protocols import Protocol, get_protocol
from .store import SPLITS, Examples, cache_folder, fingerprint, load, save
from .tasks import Task, TaskData, get_task
from .tasks.base import NotHere, Prepared, check_counts

__all__ = ["generator_options", "open_archive", "prepare"]

VERSION = 4  # of generators and readers; a change of what they give must raise it
_NO_CHANCE = 20  # examples from which on one class is no accident; smaller sets are refused where they select a model
_INNER = ("", "lra_release", "lra_release/lra_release")


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
    """Examples of a task, from the cache if they were prepared before from the same files.

    Args:
        data: folder or archive with the files of the task; None: the data set of `datasets`, for tasks that have one.
        generate: make the examples here instead, with these options changed (`Task.generates`).
        any_size: accept splits of other sizes and sequences of other lengths than the published ones.

    Raises:
        ConfigError: options that do not exist.
        CorpusError: files that are missing, damaged or of other sizes; nothing is then written.
    """
    task = get_task(task) if isinstance(task, str) else task
    rules = get_protocol(protocol)
    key: dict[str, Any] = {"version": VERSION, "task": task.name, "protocol": asdict(rules)}
    if generate is not None:
        if not 0 <= seed < 1 << 32:
            raise ConfigError(f"the seed of generated data is from 0 to {(1 << 32) - 1:,}, got {seed}")
        options = generator_options(task, generate)
        key |= {"generated": options, "seed": seed}
    elif data is None:
        key |= {"hub": task.hub}
    elif not data.exists():
        raise CorpusError(f"{data} does not exist; {task.title} needs {task.where}")
    else:
        key |= {"data": os.path.abspath(data), "files": _fingerprint_of_files(task, data)}
    folder = cache_folder(cache) / f"{task.name}-{fingerprint(key)}"
    found = load(folder)
    if found is None:
        made = task.generate(options, seed, processes) if generate is not None else _read(task, rules, data)
        _check(task, rules, made.splits, data, any_size or generate is not None)
        save(folder, made.splits, key | _manifest(task, made))
        found = load(folder)
        if found is None:
            raise CorpusError(f"{folder} could not be written")
    else:
        _check(task, rules, found[0], data, any_size or generate is not None)
    return TaskData(task, found[0], found[1])


def generator_options(task: Task, given: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a task's generator.

    Raises:
        ConfigError: an option that does not exist, a value of another kind, or an empty split.
    """
    options = complete(task.name, task.generates, given)
    for split in SPLITS:
        if split in options and options[split] < 2:
            raise ConfigError(f"{task.name}: {split} must be at least 2 examples, got {options[split]}")
    return options


def _check(task: Task, rules: Protocol, splits: Mapping[str, Examples], data: Path | None, any_size: bool) -> None:
    """Raise unless the splits are of use and, but for `any_size`, have their published sizes and lengths."""
    where = data or Path(task.name)
    if not any_size:
        check_counts(task.sizes(rules), splits, where)
    limit = rules.seqlen[task.name]
    for split in SPLITS:
        part = splits[split]
        found = np.unique(part.labels)
        if not len(part) or (len(found) < 2 and len(part) >= _NO_CHANCE):
            what = f"labels of one class only ({found[0]})" if len(found) else "no examples"
            raise CorpusError(f"{where}: {split} has {what}; nothing can be learnt or measured on it, give other data")
        if not any_size and part.lengths.max() > limit:
            raise CorpusError(
                f"{where}: the longest example of {split} has {part.lengths.max():,} tokens, protocol {rules.name} "
                f"reads at most {limit:,}; pass --any-size to take it as it is"
            )


def _fingerprint_of_files(task: Task, data: Path) -> str:
    """A name of everything that the task could read there: changed, added or removed files give another one."""
    if data.is_file():
        return fingerprint({"archive": _facts(data.stat())})
    inner = [data / inner / source for inner in _INNER for source in task.sources]
    return fingerprint({str(path.relative_to(data)): facts for root in inner for path, facts in _files(root)})


def _files(root: Path) -> Iterator[tuple[Path, list[int]]]:
    """Every file at or under `root` with its size and time."""
    if root.is_dir():
        with os.scandir(root) as entries:
            for entry in entries:
                if entry.is_dir():
                    yield from _files(root / entry.name)
                else:
                    yield root / entry.name, _facts(entry.stat(follow_symlinks=os.path.exists(entry)))
    elif root.exists():
        yield root, _facts(root.stat())


def _facts(stat: os.stat_result) -> list[int]:
    return [stat.st_size, stat.st_mtime_ns]


def _read(task: Task, rules: Protocol, data: Path | None) -> Prepared:
    if data is None:
        return _from_hub(task, rules)
    if data.is_file():
        with tempfile.TemporaryDirectory(prefix="seqlib-lra-") as aside:
            open_archive(data, Path(aside), task.sources)
            try:
                return _within(task, Path(aside), rules)
            except NotHere as error:
                raise task.missing(data) from error
    if not data.is_dir():
        raise CorpusError(f"{data} is neither a folder nor a file; {task.title} needs {task.where}")
    return _within(task, data, rules)


def _within(task: Task, root: Path, rules: Protocol) -> Prepared:
    """Read from the first inner folder that has something of the task."""
    for inner in _INNER:
        try:
            return task.read(root / inner, rules)
        except NotHere:
            continue
    raise task.missing(root)


def _from_hub(task: Task, rules: Protocol) -> Prepared:
    """The data set by name, where it is cached or reachable."""
    if task.hub is None:
        raise task.missing(None)
    import datasets

    try:
        rows = datasets.load_dataset(task.hub)
    except (OSError, ValueError, RuntimeError) as error:  # what it raises offline differs by version and by its cache
        raise NotHere(f"{task.missing(None)}; {task.hub} is neither in that cache nor reachable") from error
    return task.read_hub(rows, rules)


def open_archive(path: Path, into: Path, sources: tuple[str, ...] | None) -> None:
    """Unpack what belongs to a task.

    Args:
        sources: files and folders to unpack (`Task.sources`), at any depth; None for all.

    Raises:
        CorpusError: no archive, or one that is cut off.
    """
    try:
        with tarfile.open(path) as archive:
            for entry in archive:
                if sources is None or _belongs(entry.name, sources):
                    archive.extract(entry, into, filter="data")
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk, not of the archive
        raise CorpusError(f"{path} is cut off or no tar archive ({error}); download it again") from error


def _belongs(name: str, sources: tuple[str, ...]) -> bool:
    return any(fnmatchcase(f"/{name}/", f"*/{source}/*") for source in sources)


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
        "digest": part.digest(),
    }
