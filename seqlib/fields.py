"""Configs from plain values: every field known, and of the type that its dataclass declares."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from seqlib.errors import ConfigError

__all__ = ["from_fields"]

T = TypeVar("T")
_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "a text", types.NoneType: "null"}
_PLURALS = {int: "integers", float: "numbers", bool: "true or false", str: "texts"}


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
        options = _options(hints[name])
        if not any(_is(value, option) for option in options):
            allowed = " or ".join(_word(option) for option in options)
            raise ConfigError(f"{what}: {name} must be {allowed}, got {value!r}")
    return cls(**values)


@cache
def _hints(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}  # type: ignore[arg-type]


def _options(hint: Any) -> tuple[Any, ...]:
    """The types that a declaration allows."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _is(value: Any, kind: Any) -> bool:
    if get_origin(kind) is tuple:
        right = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
        return right and all(_is(part, get_args(kind)[0]) for part in value)
    if get_origin(kind) is Mapping:  # whose values their own config checks
        return isinstance(value, Mapping)
    if dataclasses.is_dataclass(kind):  # which is checked when it is made
        return isinstance(value, (Mapping, kind))  # type: ignore[arg-type]
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, (int, float)) and not math.isnan(value)
    return isinstance(value, kind)


def _word(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return f"a list of {_PLURALS.get(get_args(kind)[0], 'objects')}"
    return _WORDS.get(kind, "an object")
