"""Continue prompts: one onto the terminal as it comes, or many from a file of JSON lines."""

from __future__ import annotations

import codecs
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

import torch
from jinja2 import TemplateError
from transformers import AutoTokenizer, TextStreamer
from transformers.generation.streamers import BaseStreamer

import seqlib
import seqlib.hf
from seqlib.errors import ConfigError, SeqlibError, UnsupportedInput
from seqlib.hf.hub import check_name
from seqlib.hf.runs import is_run

from .data import start_token
from .settings import goes_alone, options

__all__ = ["Generation", "generate", "generate_lines", "load_model"]


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
    if is_run(Path(path)):
        path = str(Path(path) / "model")
        if not Path(path).is_dir():
            raise ConfigError(f"{Path(path).parent} is not finished; continue it with `seqlib-lm train --resume`")
    model = _opened("model", path, seqlib.from_pretrained)
    if not isinstance(model, seqlib.hf.SeqlibForCausalLM):
        raise ConfigError(f"{path} holds a {type(model).__name__}, which has no head to speak with")
    found = _opened("tokenizer", tokenizer or path, AutoTokenizer.from_pretrained)
    if not found("a", add_special_tokens=False)["input_ids"]:  # made from its class alone, without a vocabulary
        raise ConfigError(f"{tokenizer or path} has no tokenizer; name one with --tokenizer")
    size, vocab = len(found), _vocab(model)
    if size > vocab or (isinstance(found, seqlib.hf.ByteTokenizer) and vocab >= 2 * size):
        raise ConfigError(
            f"the tokenizer of {tokenizer or path} has {size} tokens, the model {vocab}; name its own with --tokenizer"
        )
    return cast(Any, model).to("cuda" if torch.cuda.is_available() else "cpu").eval(), found


def _opened(what: str, path: str, opener: Any) -> Any:
    remedy = "name one with --tokenizer" if what == "tokenizer" else "give a run folder, a folder or a hub name"
    check_name(path, what, remedy)
    try:
        return opener(path)
    except SeqlibError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:  # damaged files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].strip(" :.")
        raise ConfigError(f"no {what} could be loaded from {path!r} ({reason}); {remedy}") from error


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
    chosen = options(max_new_tokens, temperature, top_p, top_k, settings or {}, _vocab(model))
    streamer: Any = None
    streams = chosen.get("num_beams", 1) == 1  # beams are known in the end
    if out is not None and streams:
        is_bytes = isinstance(tokenizer, seqlib.hf.ByteTokenizer)
        streamer = _ByteStreamer(out) if is_bytes else TextStreamer(tokenizer, skip_special_tokens=True)
    if seed is not None:
        torch.manual_seed(seed)
    ids = _ids(tokenizer, prompt, raw)
    begun = time.perf_counter()
    ((prompt_ids, said),) = _continue(model, tokenizer, [ids], chosen | {"streamer": streamer})
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
    chosen = options(max_new_tokens, temperature, top_p, top_k, settings or {}, _vocab(model))
    if batch_size < 1:
        raise UnsupportedInput(f"batch_size must be at least 1, got {batch_size}")
    asked = [_asked(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if seed is not None:
        torch.manual_seed(seed)
    batch_size = 1 if goes_alone(settings or {}) else batch_size
    for begin in range(0, len(asked), batch_size):
        group = asked[begin : begin + batch_size]
        rows = [_ids(tokenizer, row.get("messages", row.get("prompt")), raw) for row in group]
        for row, (_, said) in zip(group, _continue(model, tokenizer, rows, chosen)):
            text = _bytes(tokenizer, said).decode(errors="replace")
            yield {**row, "completion": text, "new_tokens": len(said)}


def _vocab(model: Any) -> int:
    return int(model.config.vocab_size)


def _asked(number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"line {number} is not JSON: {error.msg}") from error
    except RecursionError:
        raise ConfigError(f"line {number} is nested too deeply") from None
    asked = row.get("messages", row.get("prompt")) if isinstance(row, dict) else None
    if not isinstance(asked, str) and not _are_messages(asked):
        raise ConfigError(
            f'line {number} must be an object with a "prompt" or "messages" of {{"role", "content"}}, '
            f"got {line.strip()[:60]}"
        )
    try:
        json.dumps(asked, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ConfigError(f"line {number} holds half of a character (a lone surrogate), which is no text") from None
    return row


def _are_messages(asked: Any) -> bool:
    return isinstance(asked, list) and bool(asked) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in asked
    )  # fmt: skip


def _ids(tokenizer: Any, prompt: Any, raw: bool) -> list[int]:
    """Tokens of a text, at the beginning of a document, or of a conversation in the tokenizer's template."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(prompt, list) or (template and not raw):
        if not template:
            raise ConfigError("the tokenizer has no chat template for messages; give each line a prompt instead")
        text = _text(prompt) if isinstance(prompt, bytes) else prompt
        messages = text if isinstance(text, list) else [{"role": "user", "content": text}]
        try:
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        except TemplateError as error:
            raise ConfigError(f"the tokenizer's chat template refuses these messages: {error}") from error
        if not ids:
            raise ConfigError("the tokenizer's chat template makes nothing of these messages; try --raw")
        return ids
    data = prompt.encode() if isinstance(prompt, str) else prompt
    is_bytes = isinstance(tokenizer, seqlib.hf.ByteTokenizer)
    ids = list(data) if is_bytes else tokenizer(_text(data), add_special_tokens=False)["input_ids"]
    return [start_token(tokenizer), *ids]


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"the prompt is not UTF-8 (byte {error.start}), which only a tokenizer of bytes takes without a template"
        ) from error


def _continue(
    model: Any, tokenizer: Any, rows: list[list[int]], options: Mapping[str, Any]
) -> list[tuple[list[int], list[int]]]:
    """Each prompt with what follows it, up to the end of its document."""
    ends = options.get("eos_token_id", model.generation_config.eos_token_id)
    ends = set(ends) if isinstance(ends, list) else {ends}
    # What fills rows must not look like an end.
    fillers = (tokenizer.pad_token_id, start_token(tokenizer), *range(_vocab(model)))
    pad = next(i for i in fillers if i is not None and i not in ends)
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    if "stop_strings" in options:
        options = {**options, "tokenizer": tokenizer}
    made = model.generate(ids, attention_mask=mask, pad_token_id=pad, **options)[:, width:].tolist()
    return [(row, _until_end(said, ends, pad)) for row, said in zip(rows, made)]


def _until_end(said: list[int], ends: set[int], pad: int) -> list[int]:
    """Without what follows an end, or the padding of a row that stopped before its neighbours."""
    said = next((said[: i + 1] for i, token in enumerate(said) if token in ends), said)
    while len(said) > 1 and said[-1] == pad:
        said = said[:-1]
    return said


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
        return os.fsencode(prompt)  # bytes of the shell that are no UTF-8 included
    if prompt_file is not None:
        try:
            return prompt_file.read_bytes()
        except OSError as error:
            raise ConfigError(f"the prompt file {prompt_file} cannot be read: {error.strerror}") from error
    if sys.stdin.isatty():
        raise ConfigError("there is no prompt; give --prompt TEXT, --prompt-file PATH or pipe text in")
    return sys.stdin.buffer.read()
