"""Continue a prompt, byte by byte onto the terminal."""

from __future__ import annotations

import codecs
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
from transformers.generation.streamers import BaseStreamer

import seqlib.hf
from seqlib.errors import CheckpointMismatch, ConfigError, SeqlibError, UnsupportedInput

from .data import start_token

__all__ = ["Generation", "generate", "load_model"]


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


def load_model(path: str) -> tuple[Any, Any]:
    """Model and tokenizer of a run folder, a model folder or a hub name.

    Raises:
        ConfigError: there is no model.
        CheckpointMismatch: its weights are incomplete or do not fit.
    """
    if (Path(path) / "recipe.json").is_file():
        path = str(Path(path) / "model")
        if not Path(path).is_dir():
            raise ConfigError(f"{Path(path).parent} is not finished; continue it with `seqlib-lm train --resume`")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except SeqlibError:
        raise
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"no model could be loaded from {path!r}: {reason}") from error
    model, info = loaded
    wrong = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "mismatched_keys") if info[kind]}
    if wrong:
        raise CheckpointMismatch(
            f"the weights in {path!r} do not make up the model: {wrong}; get a complete checkpoint"
        )
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


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
) -> Generation:
    """Continue `prompt`, which stands at the beginning of a document.

    Args:
        prompt: text, may be empty.
        max_new_tokens: at least 1.
        temperature: 0 takes the likeliest token each time; below 1 is bolder, above 1 wilder.
        top_p: sample from the likeliest tokens that hold this share of the probability, 0 < top_p <= 1.
        top_k: sample from the k likeliest tokens; 0 for all.
        seed: makes sampling repeatable.
        out: a text stream that shows prompt and continuation as they come.

    Raises:
        UnsupportedInput: an option is out of range.
    """
    for name, value, right, allowed in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        ("temperature", temperature, temperature >= 0, "0 or more"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
        ("top_k", top_k, top_k >= 0, "0 or more"),
    ):
        if not right:
            raise UnsupportedInput(f"{name} must be {allowed}, got {value}")
    is_bytes = isinstance(tokenizer, seqlib.hf.ByteTokenizer)
    text_ids = list(prompt) if is_bytes else tokenizer(prompt.decode(), add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[start_token(tokenizer), *text_ids]], device=model.device)
    streamer: Any = None
    if out is not None:
        streamer = _ByteStreamer(out) if is_bytes else TextStreamer(tokenizer, skip_special_tokens=True)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    if seed is not None:
        torch.manual_seed(seed)
    begun = time.perf_counter()
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        streamer=streamer,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else start_token(tokenizer),
        **sampling,
    )[0].tolist()
    seconds = time.perf_counter() - begun
    data = tokenizer.decode_bytes(found) if is_bytes else tokenizer.decode(found, skip_special_tokens=True).encode()
    return Generation(data, len(found) - ids.shape[1], seconds)


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
