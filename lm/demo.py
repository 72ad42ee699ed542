"""The whole story in one command: text, training, comparison, saving, loading, generating."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from seqlib import native
from seqlib.errors import ConfigError
from seqlib.hf.keep import locked
from seqlib.hf.runs import is_run, override, write_aside

from .clock import Clock
from .corpus import SPLITS, Corpus, Document
from .data import load_tokenizer, tokenize
from .evaluate import evaluate
from .generate import generate
from .ngram import NGram
from .recipes import Recipe, demo
from .runs import DataSpec, check_new, open_run
from .train import train

__all__ = ["run_demo"]

_NAME = "seqlib-lm demo"
_ORDERS = (2, 4, 6)
_RIVAL = 4  # the order of the n-gram model that ours has to beat
_MARGIN = 0.03  # bits per byte on validation files; test files may be a little harder
_ENOUGH_STEPS = 450  # of the demo's recipe, after which it does
_EVALUATION_SHARE, _REST_SHARE = 0.1, 0.05  # of the minutes; the rest is loading again, plotting and generating
_LONGEST = 3.0  # times the minutes, while the rival is ahead
_CHECK_BYTES = 100_000


def run_demo(output: Path, *, minutes: float, settings: Sequence[str], console: Console) -> None:
    """Run the demonstration into `output`, replacing an earlier one there.

    Args:
        minutes: time for everything but compiling the kernels. Evaluation gets a tenth, training what the rest leaves,
            and up to three times the minutes while the model does not beat a 4-gram model. With `steps=` in `settings`
            those are trained, however long that takes.

    Raises:
        ConfigError: `output` holds something that is no run, or a setting is wrong.
    """
    if not 0 < minutes < math.inf:
        raise ConfigError(f"minutes must be positive, got {minutes}")
    _check_output(output)
    seconds: dict[str, float] = {}

    @contextmanager
    def section(title: str) -> Iterator[None]:
        console.print(f"\n{title}", style="bold")
        begun = time.perf_counter()
        yield
        seconds[title] = time.perf_counter() - begun

    recipe = dataclasses.replace(override(demo(), settings), name=_NAME)
    data = DataSpec()
    with section("Kernels, before the clock starts"):
        missing = native.why_unavailable("cpu")
        console.print(f"slower torch forms: {missing}" if missing else f"compiled: {native.load('cpu').name}")
    begun = time.perf_counter()
    with section("Text: the standard library of this Python"):
        corpus = data.read(recipe)
        texts = {split: [document.read() for document in corpus.split(split)] for split in SPLITS}
        for split, documents in texts.items():
            console.print(f"{split:<11}{len(documents):>5} files {sum(map(len, documents)):>11,} bytes")

    with section("Baselines: n-gram models of the same bytes, smoothing chosen on validation"):
        ngrams = {order: NGram(order).fit(texts["train"]).tune(texts["validation"]) for order in _ORDERS}
        for order, ngram in ngrams.items():
            bits = ngram.bits_per_byte(texts["validation"])
            console.print(f"{order}-gram: {bits:.3f} bits per byte on the validation files")

    referee = _Referee(corpus, recipe, ngrams[_RIVAL], console)
    timed = not any(setting.split("=")[0].strip() == "steps" for setting in settings)
    total, used = 60 * minutes, time.perf_counter() - begun
    callbacks = [_clock(total, used, recipe, referee, console)] if timed else []
    with section("Training"):
        if output.exists():
            _check_output(output)
            with locked(output):  # nobody else trains there now
                shutil.rmtree(output)
        run = train(recipe, data, output, console=console, corpus=corpus, callbacks=callbacks)
    steps = callbacks[0].steps if callbacks else recipe.steps

    with section("Loading again with AutoModelForCausalLM.from_pretrained"):
        loaded = AutoModelForCausalLM.from_pretrained(run.model).eval()
        tokenizer = AutoTokenizer.from_pretrained(run.model)
        nparameters = sum(p.numel() for p in loaded.parameters())
        console.print(f"{type(loaded).__name__} from {run.model}: {nparameters:,} parameters, {recipe.layer_pattern!r}")

    with section("Evaluation of the loaded model on the test files"):
        nbytes = int(_EVALUATION_SHARE * total * referee.bytes_per_s) if timed else corpus.nbytes("test")
        chosen = _first(corpus.test, nbytes)
        scored = [document.read() for document in chosen]
        if len(chosen) < len(corpus.test):
            console.print(
                f"{len(chosen)} of {len(corpus.test)} files, {sum(map(len, scored)):,} bytes: what fits into "
                f"{_EVALUATION_SHARE:.0%} of {minutes:g} minutes"
            )
        found = evaluate(loaded, tokenize(chosen, tokenizer))
        for bucket in found.buckets:
            console.print(
                f"bytes {bucket.begin:>7,} to {bucket.end - 1:>7,}: {bucket.bits_per_token:.3f} bits per byte"
            )
    rows = [("every byte alike", 8.0), ("gzip -9", _gzip(scored))]
    rows += [(f"{order}-gram, Kneser-Ney", ngram.bits_per_byte(scored)) for order, ngram in ngrams.items()]
    rows.append((f"this model, {steps:,} steps", found.bits_per_byte))

    with section("Generation"):
        made = generate(
            loaded, tokenizer, b"def ", max_new_tokens=300, temperature=0.8, seed=recipe.seed, out=sys.stdout
        )
        console.print(f"{made.new_tokens} bytes, {made.tokens_per_s:.0f} per second")

    table = Table("on the test files", "bits per byte", title="Result")
    for name, bits in rows:
        table.add_row(name, f"{bits:.3f}")
    console.print("", table)
    console.print(
        "seconds: " + ", ".join(f"{title.split(':')[0].split(' with')[0]} {s:.0f}" for title, s in seconds.items())
    )
    held = ["model", "metrics", *(["plot"] if (output / "loss.png").is_file() else [])]
    console.print(f"total {sum(seconds.values()):.0f} s; in {output}: {', '.join(held)}")
    result = {"bits_per_byte": dict(rows), "seconds": seconds, "parameters": nparameters, "test": found.to_dict()}
    write_aside(output / "demo.json", json.dumps(result, indent=2) + "\n")


def _check_output(output: Path) -> None:
    """Raise ConfigError unless `output` is free or holds an earlier demonstration, which is all that is replaced."""
    if not is_run(output):
        check_new(output)
    elif not (output / "demo.json").is_file() and open_run(output).recipe.name != _NAME:
        raise ConfigError(f"{output} holds a run that is no demonstration, and is left alone; give another --output")


class _Referee:
    """Holds the model against the rival on validation files, and learns how fast it scores."""

    def __init__(self, corpus: Corpus, recipe: Recipe, rival: NGram, console: Console) -> None:
        documents = _first(corpus.validation, _CHECK_BYTES)
        self.nbytes = sum(document.nbytes for document in documents)
        self.tokens = tokenize(documents, load_tokenizer(recipe.tokenizer))
        self.rival = rival.bits_per_byte([document.read() for document in documents])
        self.console = console
        self.bytes_per_s = 0.0

    def __call__(self, model: Any) -> bool:
        begun = time.perf_counter()
        bits = evaluate(model, self.tokens).bits_per_byte
        self.bytes_per_s = self.nbytes / (time.perf_counter() - begun)
        self.console.print(f"validation: {bits:.3f} bits per byte, the {_RIVAL}-gram model {self.rival:.3f}")
        return bits < self.rival - _MARGIN


def _clock(total: float, used: float, recipe: Recipe, referee: _Referee, console: Console) -> Clock:
    """Training between what was done before it and what comes after, of `total` seconds."""
    share = 1 - _EVALUATION_SHARE - _REST_SHARE
    seconds, longest = (max(0.3 * whole, share * whole - used) for whole in (total, _LONGEST * total))
    console.print(
        f"of {total / 60:g} minutes training gets {seconds:.0f} s, evaluation {_EVALUATION_SHARE:.0%}; up to "
        f"{_LONGEST * total / 60:g} minutes while it does not beat the {_RIVAL}-gram model"
    )
    return Clock(
        seconds=seconds, longest=longest, enough=_ENOUGH_STEPS, good=referee, final=recipe.final_learning_rate,
        say=console.print,
    )  # fmt: skip


def _first(documents: Sequence[Document], nbytes: int) -> list[Document]:
    """The first documents, at least one, that together have no more than `nbytes`."""
    taken, size = [documents[0]], documents[0].nbytes
    for document in documents[1:]:
        size += document.nbytes
        if size > nbytes:
            break
        taken.append(document)
    return taken


def _gzip(documents: Sequence[bytes]) -> float:
    text = b"".join(documents)
    return 8 * len(gzip.compress(text, 9)) / len(text)
