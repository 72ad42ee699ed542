"""Continue prompts: one onto the terminal as it comes, or many from a file of JSON lines."""

from __future__ import annotations

import codecs
import difflib
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

import torch
from transformers import AutoTokenizer, GenerationConfig, TextStreamer
from transformers.generation.streamers import BaseStreamer

import seqlib
import seqlib.hf
from seqlib.errors import ConfigError, SeqlibError, UnsupportedInput

from .data import start_token

__all__ = ["Generation", "generate", "generate_lines", "load_model", "parse_settings"]


@dataclass(frozen=True)
class Generation:
    """A continuation and how fast it came."""

    data: bytes
    """Prompt and continuation."""
    new_tokens: int
    seconds: float
    """From the prompt to the last token."""

    @property
    def tokens_per_s(self) -> float:
        return self.new_tokens / self.seconds


def load_model(path: str, tokenizer: str | None = None) -> tuple[Any, Any]:
    """Language model and tokenizer of a run folder, or of a folder or hub name in any layout of docs/CHECKPOINTS.md.

    Args:
        tokenizer: where the tokenizer is, if not with the model: most original checkpoints have none.

    Raises:
        ConfigError: there is no language model, or no tokenizer.
        CheckpointMismatch: its layout is unknown, or its weights are incomplete or do not fit.
    """
    if (Path(path) / "recipe.json").is_file():
        path = str(Path(path) / "model")
        if not Path(path).is_dir():
            raise ConfigError(f"{Path(path).parent} is not finished; continue it with `seqlib-lm train --resume`")
    model = _opened("model", path, seqlib.from_pretrained)
    if not isinstance(model, seqlib.hf.SeqlibForCausalLM):
        raise ConfigError(f"{path} holds a {type(model).__name__}, which has no head to speak with")
    found = _opened("tokenizer", tokenizer or path, AutoTokenizer.from_pretrained)
    if not found("a", add_special_tokens=False)["input_ids"]:  # made from its class alone, without a vocabulary
        raise ConfigError(f"{tokenizer or path} has no tokenizer. Name one with --tokenizer")
    return cast(Any, model).to("cuda" if torch.cuda.is_available() else "cpu").eval(), found


def _opened(what: str, path: str, opener: Any) -> Any:
    try:
        return opener(path)
    except SeqlibError:
        raise
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].strip(" :.")
        hint = ". Name one with --tokenizer" if what == "tokenizer" else ""
        raise ConfigError(f"no {what} could be loaded from {path!r} ({reason}){hint}") from error


def generate(
    model: Any,
    tokenizer: Any,
    prompt: bytes,
    *,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    out: TextIO | None = None,
    raw: bool = True,
    settings: Mapping[str, Any] | None = None,
) -> Generation:
    """Continue `prompt`, which stands at the beginning of a document.

    Args:
        prompt: text, may be empty.
        max_new_tokens: at least 1.
        temperature: 0 takes the likeliest token each time; below 1 is bolder, above 1 wilder.
        top_p: sample from the likeliest tokens that hold this share of the probability, 0 < top_p <= 1.
        top_k: sample from the k likeliest tokens; 0 for all.
        seed: makes sampling repeatable.
        out: a text stream that shows prompt and continuation as they come, or with several beams in the end.
        raw: False puts the prompt into the tokenizer's chat template, if it has one, as what a user says.
        settings: further fields of transformers' GenerationConfig.

    Raises:
        UnsupportedInput: an option is out of range.
    """
    options = _options(max_new_tokens, temperature, top_p, top_k, settings or {})
    streamer: Any = None
    streams = options.get("num_beams", 1) == 1  # beams are known in the end
    if out is not None and streams:
        is_bytes = isinstance(tokenizer, seqlib.hf.ByteTokenizer)
        streamer = _ByteStreamer(out) if is_bytes else TextStreamer(tokenizer, skip_special_tokens=True)
    if seed is not None:
        torch.manual_seed(seed)
    ids = _ids(tokenizer, prompt, raw)
    begun = time.perf_counter()
    ((prompt_ids, said),) = _continue(model, tokenizer, [ids], options | {"streamer": streamer})
    made = Generation(_bytes(tokenizer, [*prompt_ids, *said]), len(said), time.perf_counter() - begun)
    if out is not None and not streams:
        out.write(made.data.decode(errors="replace") + "\n")
    return made


def generate_lines(
    model: Any,
    tokenizer: Any,
    lines: Iterable[str],
    *,
    batch_size: int = 8,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    raw: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """Continue many prompts, `batch_size` at a time, in their order.

    Args:
        lines: JSON objects with a "prompt" (text) or "messages" (a list of {"role", "content"}, for tokenizers with a
            chat template); further fields pass through. Other options as for `generate`.

    Yields:
        Each object with its "completion" and "new_tokens".

    Raises:
        ConfigError: a line that is none of these.
    """
    options = _options(max_new_tokens, temperature, top_p, top_k, settings or {})
    if batch_size < 1:
        raise UnsupportedInput(f"batch_size must be at least 1, got {batch_size}")
    asked = [_asked(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if seed is not None:
        torch.manual_seed(seed)
    for begin in range(0, len(asked), batch_size):
        group = asked[begin : begin + batch_size]
        rows = [_ids(tokenizer, row.get("messages", row.get("prompt")), raw) for row in group]
        for row, (_, said) in zip(group, _continue(model, tokenizer, rows, options)):
            text = _bytes(tokenizer, said).decode(errors="replace")
            yield {**row, "completion": text, "new_tokens": len(said)}


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """Fields of transformers' GenerationConfig from key=value, where a value is JSON or else text.

    >>> parse_settings(["repetition_penalty=1.2", "num_beams=3"])
    {'repetition_penalty': 1.2, 'num_beams': 3}
    """
    known, made = GenerationConfig().to_dict(), {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator:
            raise ConfigError(f"--set takes key=value, got {pair!r}")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"transformers' GenerationConfig has no field {name!r}{hint}")
        try:
            made[name] = json.loads(value)
        except json.JSONDecodeError:
            made[name] = value
    return made


def _options(
    max_new_tokens: int, temperature: float, top_p: float, top_k: int, settings: Mapping[str, Any]
) -> dict[str, Any]:
    for name, value, right, allowed in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        ("temperature", temperature, temperature >= 0, "0 or more"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
        ("top_k", top_k, top_k >= 0, "0 or more"),
    ):
        if not right:
            raise UnsupportedInput(f"{name} must be {allowed}, got {value}")
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    return sampling | {"max_new_tokens": max_new_tokens} | dict(settings)


def _asked(number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"line {number} is not JSON: {error.msg}") from error
    if not isinstance(row, dict) or not isinstance(row.get("messages", row.get("prompt")), (str, list)):
        raise ConfigError(f'line {number} must be an object with a "prompt" or "messages", got {line.strip()[:60]}')
    return row


def _ids(tokenizer: Any, prompt: Any, raw: bool) -> list[int]:
    """Tokens of a text, at the beginning of a document, or of a conversation in the tokenizer's template."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(prompt, list) or (template and not raw):
        if not template:
            raise ConfigError("the tokenizer has no chat template for messages; give each line a prompt instead")
        text = prompt.decode() if isinstance(prompt, bytes) else prompt
        messages = text if isinstance(text, list) else [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    data = prompt.encode() if isinstance(prompt, str) else prompt
    is_bytes = isinstance(tokenizer, seqlib.hf.ByteTokenizer)
    ids = list(data) if is_bytes else tokenizer(data.decode(), add_special_tokens=False)["input_ids"]
    return [start_token(tokenizer), *ids]


def _continue(
    model: Any, tokenizer: Any, rows: list[list[int]], options: Mapping[str, Any]
) -> list[tuple[list[int], list[int]]]:
    """Each prompt with what follows it, up to the end of its document."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else start_token(tokenizer)
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    made = model.generate(ids, attention_mask=mask, pad_token_id=pad, **options)[:, width:].tolist()
    ends = model.generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends}
    said = [next((row[: i + 1] for i, token in enumerate(row) if token in ends), row) for row in made]
    return list(zip(rows, said))


def _bytes(tokenizer: Any, ids: list[int]) -> bytes:
    if isinstance(tokenizer, seqlib.hf.ByteTokenizer):
        return tokenizer.decode_bytes(ids)
    return tokenizer.decode(ids, skip_special_tokens=True).encode()


class _ByteStreamer(BaseStreamer):
    """Shows bytes as text as soon as a character is complete."""

    def __init__(self, out: TextIO) -> None:
        self.out = out
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def put(self, value: torch.Tensor) -> None:
        data = bytes(i for i in value.flatten().tolist() if i < 256)
        self.out.write(self.decoder.decode(data))
        self.out.flush()

    def end(self) -> None:
        self.out.write(self.decoder.decode(b"", final=True) + "\n")
        self.out.flush()


def read_prompt(prompt: str | None, prompt_file: Path | None) -> bytes:
    """The prompt of an argument, else of a file, else of standard input when something is piped into it."""
    if prompt is not None and prompt_file is not None:
        raise ConfigError("give either --prompt or --prompt-file, not both")
    if prompt is not None:
        return prompt.encode()
    if prompt_file is not None:
        try:
            return prompt_file.read_bytes()
        except OSError as error:
            raise ConfigError(f"the prompt file {prompt_file} cannot be read: {error.strerror}") from error
    if sys.stdin.isatty():
        raise ConfigError("there is no prompt; give --prompt TEXT, --prompt-file PATH or pipe text in")
    return sys.stdin.buffer.read()
