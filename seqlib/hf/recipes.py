"""What recipes of every application share: bounds of their numbers, mixers named in text, models that fit in memory."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import set_seed

from seqlib.errors import ConfigError, SeqlibError
from seqlib.mixers import MIXERS, mixer_config

__all__ = ["LAYERS", "built", "check_numbers", "checked_mixer", "layers_of"]

LAYERS = 10_000
M = TypeVar("M", bound=nn.Module)
_BYTES_TRAINED = 16  # per parameter: weight, gradient and two moments in float32


def check_numbers(where: str, value: Any) -> None:
    """Raise ConfigError for numbers that no size or factor can be, wherever they stand in a field."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            check_numbers(f"{where}.{key}", part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            check_numbers(where, part)
    elif isinstance(value, (int, float)) and not abs(value) < 1 << 31:
        raise ConfigError(f"{where} must be a number below 2,147,483,648 in size, got {value!r}")
    elif isinstance(value, str) and any(int(count) > LAYERS for count in re.findall(r"\*\s*(\d+)", value)):
        raise ConfigError(f"{where} repeats layers at most {LAYERS:,} times, got {value[:60]!r}")


def layers_of(text: str) -> list[dict[str, Any]]:
    """Configs of the layers that take turns: "mamba", "gated_conv based", or one JSON object."""
    if not text.startswith("{"):
        kinds = text.split()
        if not kinds:
            raise ConfigError(f"--mixer names no kind; known: {', '.join(MIXERS)}")
        return [{"kind": kind} for kind in kinds]
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--mixer is no JSON object ({error}): {text}") from error
    except RecursionError:
        raise ConfigError("--mixer is nested too deeply") from None
    if not isinstance(found, dict) or not isinstance(found.get("kind"), str):
        raise ConfigError(f'--mixer needs a kind, like {{"kind": "mamba"}}, got {text}')
    return [found]


def checked_mixer(where: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of a mixer, as it was given.

    Raises:
        ConfigError: a kind or field that does not exist, or a value that its field cannot take.
    """
    try:
        mixer_config(config)
    except (TypeError, AttributeError, ZeroDivisionError, OverflowError) as error:
        raise ConfigError(f"{where} has a value of another type than its field ({error})") from error
    return config


def built(name: str, seed: int, make: Callable[[], M]) -> M:
    """The model that `make` makes, once it is known that its training fits into memory.

    Args:
        name: of the recipe, for the errors.
        seed: decides the weights.

    Raises:
        ConfigError: the recipe describes no model, or one that is larger than this machine.
    """
    try:
        with torch.device("meta"):
            count = sum(p.numel() for p in make().parameters())
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if count * _BYTES_TRAINED > memory:
            raise ConfigError(
                f"recipe {name}: a model of {count:,} parameters needs {count * _BYTES_TRAINED / 1e9:,.0f} GB to be "
                f"trained, this machine has {memory / 1e9:,.0f}; take a smaller d_model, n_layer or mlp"
            )
        set_seed(seed)
        return make()
    except (TypeError, ValueError, AttributeError, ZeroDivisionError, OverflowError) as error:
        if isinstance(error, SeqlibError):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"recipe {name} describes no model ({reason}); see its mixers and mlp") from error
