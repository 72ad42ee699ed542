"""What applications share about runs: recipes changed by settings, small files that are never found half written."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from seqlib.errors import ConfigError

__all__ = ["for_folder", "for_writing", "is_run", "override", "read_json", "read_metrics", "save_figure", "write_aside"]

R = TypeVar("R")
T = TypeVar("T")
_MARKS = {"recipe.json": {"recipe", "data"}, "plan.json": {"recipe", "seeds"}, "sweep.json": {"recipe", "sweep"}}


def for_writing(path: Path | None) -> Path | None:
    """The path, for an option of a command line that writes there in the end.

    Raises:
        ConfigError: nothing can be written there, which is better known before the work than after it.
    """
    if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK)):
        raise ConfigError(f"{path} cannot be written; give the name of a file in a folder that exists and is writable")
    return path


def for_folder(path: Path | None) -> Path | None:
    """The path, for an option whose command makes a folder there in the end.

    Raises:
        ConfigError: no folder can be made or written there, which is better known before the work than after it.
    """
    if path is None:
        return None
    try:
        there = next(part for part in (path, *path.absolute().parents) if part.exists() or part.is_symlink())
        right = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    except OSError as error:
        raise ConfigError(f"{path} cannot be a folder ({error.strerror}); give another --output") from error
    if not right:
        raise ConfigError(f"{path} is no folder and cannot become one, or cannot be written; give another --output")
    return path


def write_aside(path: Path, text: str) -> None:
    """Write a small file so that a reader finds the old content or the new one, never a part."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure in the format that the file's suffix names, as `write_aside` writes text.

    Raises:
        ConfigError: no such format.
    """
    known = figure.canvas.get_supported_filetypes()
    if path.suffix[1:] not in known:
        raise ConfigError(f"a chart ends in one of .{', .'.join(known)}; got {path}")
    part = path.with_name(f".{path.name}.part")
    figure.savefig(part, format=path.suffix[1:], dpi=130)
    os.replace(part, path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file up to the first that is none, such as one that a kill cut off."""
    rows: list[dict[str, Any]] = []
    for line in path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            break
        rows.append(row)
    return rows


def read_json(path: Path, take: Callable[[Any], T]) -> T:
    """What `take` makes of a JSON file.

    Raises:
        ConfigError: the file is no JSON, or not what `take` expects.
    """
    try:
        return take(json.loads(path.read_text("utf-8")))
    except ConfigError:  # it says more
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read ({error!r}); start a new run in another --output") from error


def is_run(folder: Path) -> bool:
    """Whether the folder was made by one of our command lines, by the files that each leaves first."""
    for name, keys in _MARKS.items():
        if (folder / name).is_file():
            try:
                if keys <= read_json(folder / name, lambda values: values.keys()):
                    return True
            except (ConfigError, OSError):
                continue
    return False


def override(recipe: R, settings: Sequence[str]) -> R:
    """A recipe, any dataclass with a `name`, with `key=value` settings; dots reach into its dicts ("mlp.d_mlp=256").

    Values are read as JSON where they can be and as text otherwise, and must have the type of the field.

    Raises:
        ConfigError: an unknown field, or a value that does not fit it.
    """
    types = {name: kind for name, kind in get_type_hints(type(recipe)).items() if name != "name"}
    changes: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        name, *path = key.strip().split(".")
        if not equals or not name:
            raise ConfigError(f"--set takes key=value, got {setting!r}")
        if name not in types:
            near = difflib.get_close_matches(name, types, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(f"a recipe has no field {name!r}; {hint}known: {', '.join(types)}")
        value = _parse(text.strip())
        if path:
            value = _replaced(key, changes.get(name, getattr(recipe, name)), path, value)
        changes[name] = _fitted(key, types[name], value, text)
    return dataclasses.replace(recipe, **changes)  # type: ignore[type-var]


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def _replaced(key: str, tree: Any, path: list[str], value: Any) -> dict[str, Any]:
    """A copy of nested dicts with the value at `path` replaced."""
    if tree is not None and not isinstance(tree, Mapping):
        raise ConfigError(f"--set {key}: {tree!r} has no parts to set")
    first, *rest = path
    parts = dict(tree or {})
    parts[first] = _replaced(key, parts.get(first), rest, value) if rest else value
    return parts


def _fitted(key: str, kind: Any, value: Any, text: str) -> Any:
    """The value as the field's type, if it is one."""
    if kind is float and type(value) is int:
        return float(value)
    if kind is str and type(value) in (int, float):
        return text
    if kind in (int, float, bool, str):
        fits, wanted = type(value) is kind, kind.__name__
    else:
        fits, wanted = isinstance(value, Mapping) or (value is None and type(None) in get_args(kind)), "a JSON object"
    if not fits:
        raise ConfigError(f"--set {key}: {text!r} is not {wanted}")
    return value
