"""Configs from plain values: every field known, and of the type that its dataclass declares."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from seqlib.errors import ConfigError

__all__ = ["from_fields"]

T = TypeVar("T")
_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "a text", types.NoneType: "null"}


def from_fields(cls: type[T], values: Mapping[str, Any], what: str) -> T:
    """`cls(**values)` of a dataclass, whose values may come from a file or a command line.

    Args:
        what: how errors call the config.

    Raises:
        ConfigError: a field that does not exist, or a value of another type than declared. Integers are numbers, too;
            NaN is none.
    """
    hints = _hints(cls)  # type: ignore[arg-type]
    unknown = sorted(values.keys() - hints.keys())
    if unknown:
        close = difflib.get_close_matches(unknown[0], hints, n=1)
        raise ConfigError(
            f"{what} has no field {', '.join(unknown)}"
            + (f"; did you mean {close[0]}?" if close else "")
            + f"; known: {', '.join(sorted(hints))}"
        )
    for name, value in values.items():
        kinds = _kinds(hints[name])
        if kinds and not any(_is(value, kind) for kind in kinds):
            allowed = " or ".join(_WORDS[kind] for kind in kinds)
            raise ConfigError(f"{what}: {name} must be {allowed}, got {value!r}")
    return cls(**values)


@cache
def _hints(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}  # type: ignore[arg-type]


def _kinds(hint: Any) -> tuple[type, ...]:
    """The plain types of a declaration; () where it also allows something else, which its own config checks."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return options if all(option in _WORDS for option in options) else ()


def _is(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, (int, float)) and not math.isnan(value)
    return isinstance(value, kind)
