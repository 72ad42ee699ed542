"""What transformers calls things, which changes with its versions, and what it passes to any model."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, TypeVar

from transformers.modeling_outputs import BaseModelOutputWithPast

from seqlib.errors import UnsupportedInput

__all__ = ["CACHE", "CACHE_NAMES", "given_cache", "output", "refuse_unknown", "returned_cache"]

T = TypeVar("T")
CACHE_NAMES = ("cache", "past_key_values")
"""The argument, output and key of `generate` for what came before: the name since 5.24, and the one before it."""
CACHE = next(name for name in CACHE_NAMES if name in {f.name for f in dataclasses.fields(BaseModelOutputWithPast)})
"""The name in this version."""

# What transformers, its collators and PEFT pass to any model. The first decide nothing here whatever their value; the
# others ask for something that these models do not have, unless they are None or False.
_INERT = {"cache_position", "cu_seq_lens_k", "max_length_q", "max_length_k", "num_items_in_batch"}
_ABSENT = {"output_attentions", "output_router_logits", "head_mask", "encoder_hidden_states", "encoder_attention_mask"}
_READ = {"output_hidden_states", "return_dict"}


def given_cache(cache: T | None, past_key_values: T | None) -> T | None:
    """The cache that a forward got under one of its names."""
    if cache is not None and past_key_values is not None:
        raise UnsupportedInput("cache and past_key_values are two names of one argument; give one of them")
    return past_key_values if cache is None else cache


def returned_cache(outputs: Any) -> Any:
    """The cache in the outputs of any transformers model, None if there is none."""
    return next((outputs[name] for name in (CACHE, *CACHE_NAMES) if _has(outputs, name)), None)


def _has(outputs: Any, name: str) -> bool:
    return isinstance(outputs, Mapping) and name in outputs.keys()  # noqa: SIM118 - `in` warns of the old name


def output(cls: type[T], *, cache: Any, **fields: Any) -> T:
    """An output of transformers with a cache in it."""
    return cls(**{CACHE: cache}, **fields)


def refuse_unknown(model: Any, arguments: Mapping[str, Any]) -> None:
    """Raise for arguments of `forward` that no signature names, with the nearest that one does.

    Args:
        model: the model that was called.
        arguments: what its `forward` got in `**kwargs`.
    """
    for name, value in arguments.items():
        known = _arguments(type(model)) | _arguments(type(getattr(model, "model", model)))  # type: ignore[arg-type]
        if name in known | _INERT | _READ or (name in _ABSENT and (value is None or value is False)):
            continue
        if name in _ABSENT:
            raise UnsupportedInput(f"{type(model).__name__} has nothing for {name}={value!r}; leave it out")
        close = difflib.get_close_matches(name, sorted(known | _READ), n=1)
        raise UnsupportedInput(
            f"{type(model).__name__} has no argument {name!r}"
            + (f"; did you mean {close[0]!r}?" if close else "")
            + f" Its arguments are {', '.join(sorted(known))}"
        )


@lru_cache
def _arguments(cls: type) -> frozenset[str]:
    return frozenset(inspect.signature(cls.forward).parameters) - {"self", "kwargs"}  # type: ignore[attr-defined]
