"""Fields of transformers' GenerationConfig that `seqlib-lm generate` takes, their values, and why not the others."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig

from seqlib.errors import ConfigError, UnsupportedInput

__all__ = ["FIELDS", "REFUSED", "goes_alone", "options", "parse_settings"]


@dataclass(frozen=True)
class Field:
    """What a field may be, and what it needs to have an effect."""

    allowed: str
    fits: Callable[[Any, int], bool]
    """Of a value and the number of tokens in the vocabulary."""
    needs: str | None = None
    """"sampling", "beams", or another field."""
    alone: bool = False
    """It looks at the prompt or the clock, so prompts are continued one by one and never padded."""


def _whole(low: int, high: float = math.inf) -> tuple[str, Callable[[Any, int], bool]]:
    words = f"a whole number of at least {low}" if high == math.inf else f"a whole number from {low} to {high}"
    return words, lambda v, _: type(v) is int and low <= v <= high


def _number(low: float, high: float, words: str) -> tuple[str, Callable[[Any, int], bool]]:
    return words, lambda v, _: type(v) in (int, float) and math.isfinite(v) and low <= v <= high


def _tokens(value: Any, vocab: int) -> bool:
    return isinstance(value, list) and bool(value) and all(type(i) is int and 0 <= i < vocab for i in value)


def _biases(value: Any, vocab: int) -> bool:
    return isinstance(value, list) and bool(value) and all(
        isinstance(pair, list) and len(pair) == 2 and _tokens(pair[0], vocab) and type(pair[1]) is float
        and math.isfinite(pair[1]) for pair in value
    )  # fmt: skip


def _decay(value: Any, vocab: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and type(value[0]) is int
        and value[0] >= 0
        and type(value[1]) in (int, float)
        and 0 < value[1] < math.inf
    )


def _strings(value: Any, vocab: int) -> bool:
    texts = value if isinstance(value, list) else [value]
    return bool(texts) and all(isinstance(text, str) and text for text in texts)


_SHARE = _number(1e-9, 1 - 1e-9, "a number above 0 and below 1")
_POSITIVE = _number(1e-9, 1e9, "a positive number")
_SWITCH = ("true or false", lambda v, _: type(v) is bool)
_TOKENS = ("a list of token ids of the vocabulary, such as [10, 13]", _tokens)
FIELDS: dict[str, Field] = {
    "min_new_tokens": Field(*_whole(0)),
    "max_time": Field(*_number(1e-3, 1e9, "a positive number of seconds"), alone=True),
    "stop_strings": Field("a text or a list of texts", _strings),
    "num_beams": Field(*_whole(1, 1000)),
    "early_stopping": Field('true, false or "never"', lambda v, _: type(v) is bool or v == "never", "beams"),
    "length_penalty": Field(*_number(-1e9, 1e9, "a number"), "beams"),
    "use_cache": Field(*_SWITCH),
    "prefill_chunk_size": Field(*_whole(1)),
    "min_p": Field(*_number(0, 1, "a number from 0 to 1"), "sampling"),
    "top_h": Field(*_SHARE, "sampling"),
    "typical_p": Field(*_SHARE, "sampling"),
    "epsilon_cutoff": Field(*_SHARE, "sampling"),
    "eta_cutoff": Field(*_SHARE, "sampling"),
    "repetition_penalty": Field(*_POSITIVE, alone=True),
    "encoder_repetition_penalty": Field(*_POSITIVE, alone=True),
    "no_repeat_ngram_size": Field(*_whole(0), alone=True),
    "encoder_no_repeat_ngram_size": Field(*_whole(0), alone=True),
    "bad_words_ids": Field(
        "a list of lists of token ids, such as [[10]]",
        lambda v, vocab: isinstance(v, list) and bool(v) and all(_tokens(word, vocab) for word in v),
        alone=True,
    ),
    "sequence_bias": Field("a list of [token ids, number with a point], such as [[[10], -2.0]]", _biases, alone=True),
    "renormalize_logits": Field(*_SWITCH),
    "remove_invalid_values": Field(*_SWITCH),
    "forced_eos_token_id": Field("a token id of the vocabulary", lambda v, vocab: type(v) is int and 0 <= v < vocab),
    "eos_token_id": Field(
        "a token id of the vocabulary or a list of them",
        lambda v, vocab: _tokens(v if isinstance(v, list) else [v], vocab),
    ),
    "exponential_decay_length_penalty": Field("[first new token, factor], such as [20, 1.1]", _decay),
    "suppress_tokens": Field(*_TOKENS),
    "begin_suppress_tokens": Field(*_TOKENS),
    "prompt_lookup_num_tokens": Field(*_whole(1, 1000), alone=True),
    "max_matching_ngram_size": Field(*_whole(1, 1000), "prompt_lookup_num_tokens", alone=True),
}

_NO_ASSISTANT = "there is no assisting model on this command line; drafts from the prompt: prompt_lookup_num_tokens"
_TEXT_ONLY = "this command shows text only; call generate() in Python for it"
_NO_LONGER = "transformers has no such search any more"
_STATES = "states and caches of these models are allocated by seqlib"
_TOKENIZER = "the tokenizer decides it"
REFUSED: dict[str, str] = {
    "max_length": "give --max-new-tokens",
    "max_new_tokens": "give --max-new-tokens",
    "min_length": "set min_new_tokens, which does not count the prompt",
    "do_sample": "give --temperature, 0 for the likeliest token each time",
    "temperature": "give --temperature",
    "top_p": "give --top-p",
    "top_k": "give --top-k",
    "num_return_sequences": "give the prompt as often as you want it with --lines",
    "token_healing": "it needs a tokenizer with merges and changes the prompt",
    "guidance_scale": "it needs a second prompt; call generate() in Python for it",
    "forced_bos_token_id": "a prompt always has its first token already",
    "watermarking_config": "call generate() in Python for it",
    "use_mtp": "these models have no heads for several tokens",
    "compile_config": "call generate() in Python for it",
    "disable_compile": "nothing is compiled here",
    "continuous_batching_config": "give --batch-size",
    "low_memory": _NO_LONGER,
    "penalty_alpha": _NO_LONGER,
    "dola_layers": _NO_LONGER,
    "diversity_penalty": _NO_LONGER,
    "num_beam_groups": _NO_LONGER,
    "constraints": _NO_LONGER,
    "force_words_ids": _NO_LONGER,
} | {
    name: reason
    for reason, names in {
        _STATES: ("cache_implementation", "cache_config", "max_cache_len"),
        _TOKENIZER: ("pad_token_id", "bos_token_id", "decoder_start_token_id"),
        _TEXT_ONLY: (
            "output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate",
        ),
        _NO_ASSISTANT: (
            "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
            "assistant_early_exit", "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight",
            "speculation_type",
        ),
    }.items()
    for name in names
}  # fmt: skip


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """Fields of transformers' GenerationConfig from key=value, where a value is JSON or else text.

    >>> parse_settings(["repetition_penalty=1.2", "num_beams=3"])
    {'repetition_penalty': 1.2, 'num_beams': 3}
    """
    made = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator:
            raise ConfigError(f"--set takes key=value, got {pair!r}")
        _check_name(name)
        try:
            made[name] = json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            made[name] = value
    return made


def _check_name(name: str) -> None:
    theirs = GenerationConfig().to_dict()
    if name in REFUSED:
        raise ConfigError(f"--set {name} is not for this command: {REFUSED[name]}")
    if name not in FIELDS:
        close = difflib.get_close_matches(name, FIELDS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(FIELDS)}"
        what = "this command has no field" if name in theirs else "transformers' GenerationConfig has no field"
        raise ConfigError(f"{what} {name!r}{hint}")
    if name not in theirs:
        raise ConfigError(f"--set {name}: this version of transformers has no such field")


def options(
    max_new_tokens: int, temperature: float, top_p: float, top_k: int, settings: Mapping[str, Any], vocab: int
) -> dict[str, Any]:
    """What `generate` of transformers is called with.

    Raises:
        UnsupportedInput: a value is out of range, or would have no effect.
        ConfigError: a field that this command does not take.
    """
    for name, value, right, allowed in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        ("temperature", temperature, 0 <= temperature < math.inf, "0 or more"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
        ("top_k", top_k, top_k >= 0, "0 or more"),
    ):
        if not right:
            raise UnsupportedInput(f"{name} must be {allowed}, got {value}")
    if temperature == 0 and (top_p != 1 or top_k != 0):
        raise UnsupportedInput("top_p and top_k have no effect at temperature 0; leave them out or raise it")
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    for name, value in settings.items():
        _check_name(name)
        _check_value(name, value, settings, temperature, vocab)
    if settings.get("min_new_tokens", 0) > max_new_tokens:
        raise UnsupportedInput(f"min_new_tokens must be at most max_new_tokens={max_new_tokens}")
    if settings.get("num_beams", 1) > 1 and "prompt_lookup_num_tokens" in settings:
        raise UnsupportedInput("num_beams and prompt_lookup_num_tokens do not go together; leave one out")
    return sampling | {"max_new_tokens": max_new_tokens} | dict(settings)


def _check_value(name: str, value: Any, settings: Mapping[str, Any], temperature: float, vocab: int) -> None:
    field = FIELDS[name]
    if not field.fits(value, vocab):
        raise UnsupportedInput(f"--set {name} must be {field.allowed}, got {value!r}")
    met = {"sampling": temperature > 0, "beams": settings.get("num_beams", 1) > 1}
    if field.needs is not None and not met.get(field.needs, field.needs in settings):
        remedy = {"sampling": "a --temperature above 0", "beams": "--set num_beams=2 or more"}
        raise UnsupportedInput(f"--set {name} has no effect without {remedy.get(field.needs, field.needs)}")


def goes_alone(settings: Mapping[str, Any]) -> bool:
    """Whether prompts are continued one by one, because padding or a neighbour would change what a setting does."""
    return any(FIELDS[name].alone for name in settings)
