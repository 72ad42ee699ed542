"""What transformers calls things, which changes with its versions, and what it passes to any model."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, TypeVar

from transformers import GenerationConfig, PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast

from seqlib.errors import UnsupportedInput

__all__ = [
    "CACHE",
    "CACHE_NAMES",
    "given_cache",
    "nearest",
    "of_any_config",
    "output",
    "refuse_unknown",
    "returned_cache",
    "under_both_names",
    "under_one_name",
]

T = TypeVar("T")
CACHE_NAMES = ("cache", "past_key_values")
"""The argument, output and key of `generate` for what came before: the name since 5.24, and the one before it."""
CACHE = next(name for name in CACHE_NAMES if name in {f.name for f in dataclasses.fields(BaseModelOutputWithPast)})
"""The name in this version."""

# What transformers, its collators and PEFT pass to any model. The first decide nothing here whatever their value; the
# others ask for something that these models do not have, unless they are None or False.
_INERT = {"cache_position", "cu_seq_lens_k", "max_length_q", "max_length_k", "num_items_in_batch"}
_ABSENT = {
    "cache_params",
    "encoder_attention_mask",
    "encoder_hidden_states",
    "head_mask",
    "output_attentions",
    "output_router_logits",
    "token_type_ids",
}
_READ = {"output_hidden_states", "return_dict"}

# What transformers writes into any config, beside the fields and properties of its base class.
_IN_CONFIGS = {
    "add_cross_attention",
    "attn_implementation",
    "auto_map",
    "cross_attention_hidden_size",
    "custom_pipelines",
    "experts_implementation",
    "finetuning_task",
    "is_decoder",
    "per_layer_config",
    "prefix",
    "pruned_heads",
    "quantization_config",
    "sep_token_id",
    "task_specific_params",
    "tie_encoder_decoder",
    "tokenizer_class",
    "torchscript",
    "use_bfloat16",
}


def given_cache(cache: T | None, past_key_values: T | None) -> T | None:
    """The cache that a forward got under one of its names."""
    if cache is not None and past_key_values is not None:
        raise UnsupportedInput("cache and past_key_values are two names of one argument; give one of them")
    return past_key_values if cache is None else cache


def returned_cache(outputs: Any) -> Any:
    """The cache in the outputs of any transformers model, None if there is none."""
    return next((outputs[name] for name in (CACHE, *CACHE_NAMES) if _has(outputs, name)), None)


def under_one_name(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The same arguments with the cache, if there is one, under its name in this version."""
    cache = given_cache(*(arguments.get(name) for name in CACHE_NAMES))
    rest = {name: value for name, value in arguments.items() if name not in CACHE_NAMES}
    return rest if cache is None else rest | {CACHE: cache}


def under_both_names(outputs: T) -> T:
    """An output of transformers that can be asked for its cache by either name; newer ones can by themselves."""
    for name in CACHE_NAMES:
        if hasattr(outputs, CACHE) and not hasattr(type(outputs), name) and not hasattr(outputs, name):
            setattr(outputs, name, getattr(outputs, CACHE))
    return outputs


def _has(outputs: Any, name: str) -> bool:
    return isinstance(outputs, Mapping) and name in outputs.keys()  # noqa: SIM118 - `in` warns of the old name


def output(cls: type[T], *, cache: Any, **fields: Any) -> T:
    """An output of transformers with a cache in it."""
    return under_both_names(cls(**{CACHE: cache}, **fields))


def refuse_unknown(model: Any, arguments: Mapping[str, Any]) -> None:
    """Raise for arguments of `forward` that no signature names, with the nearest that one does.

    Args:
        model: the model that was called.
        arguments: what its `forward` got in `**kwargs`.
    """
    for name, value in arguments.items():
        known = _arguments(type(model)) | _arguments(type(getattr(model, "model", model))) | _READ  # type: ignore[arg-type]
        if name in known | _INERT or (name in _ABSENT and (value is None or (isinstance(value, int) and not value))):
            continue
        if name in _ABSENT:
            raise UnsupportedInput(f"{type(model).__name__} has nothing for {name}={value!r}; leave it out")
        raise UnsupportedInput(
            f"{type(model).__name__} has no argument {name!r}{nearest(name, known)} "
            f"Its arguments are {', '.join(sorted(known))}"
        )


@lru_cache
def _arguments(cls: type) -> frozenset[str]:
    named = frozenset(inspect.signature(cls.forward).parameters) - {"self", "kwargs"}  # type: ignore[attr-defined]
    return named | frozenset(getattr(cls, "arguments_in_kwargs", ()))


def nearest(name: str, known: Iterable[str]) -> str:
    """How a sentence about an unknown name ends: with the known one that was probably meant, if any is close."""
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else "."


def of_any_config(name: str) -> bool:
    """Whether transformers, of this version or another, writes a field of that name into configs of any model."""
    if name.startswith("_") or name in _IN_CONFIGS | _generation():
        return True
    return hasattr(PretrainedConfig, name) and not callable(getattr(PretrainedConfig, name))


@lru_cache
def _generation() -> frozenset[str]:
    return frozenset(vars(GenerationConfig()))
