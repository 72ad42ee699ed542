"""Options of generators: defaults put under what is given, and every value held against its default's kind."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

from seqlib.errors import ConfigError

__all__ = ["complete"]

Options = Mapping[str, Any]


def complete(name: str, defaults: Options, given: Options) -> dict[str, Any]:
    """The options of `name` with `given` put over the defaults.

    Raises:
        ConfigError: an option that does not exist, or a value of another kind than its default.
    """
    for key, value in given.items():
        if key not in defaults:
            near = difflib.get_close_matches(key, defaults, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            known = ", ".join(defaults) or "none: this task needs files"
            raise ConfigError(f"{name} has no option {key}; {hint}known: {known}")
        _check(f"{name}: {key}", value, defaults[key])
    return {**defaults, **given}


def _check(what: str, value: Any, default: Any) -> None:
    if isinstance(default, bool):
        right, wanted = isinstance(value, bool), "true or false"
    elif isinstance(default, int):
        right, wanted = type(value) is int and 0 <= value < 1 << 31, "an integer from 0 to 2,147,483,647"
    else:
        right = type(value) in (int, float) and math.isfinite(value)
        wanted = "a number"
    if not right:
        raise ConfigError(f"{what} must be {wanted}, got {value!r}")
