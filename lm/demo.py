"""The whole story in one command: text, training, comparison, saving, loading, generating."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from seqlib.errors import ConfigError
from seqlib.hf.keep import locked
from seqlib.hf.runs import is_run, override, read_metrics, write_aside

from .corpus import Corpus
from .data import tokenize
from .evaluate import evaluate
from .generate import generate
from .ngram import NGram
from .recipes import Recipe, demo
from .runs import DataSpec, check_new, open_run
from .train import train

__all__ = ["run_demo"]

_NAME = "seqlib-lm demo"
_ORDERS = (2, 4, 6)
_TRIAL_STEPS = 10
_REST_SECONDS = 15.0


def run_demo(output: Path, *, minutes: float, settings: Sequence[str], console: Console) -> None:
    """Run the demonstration into `output`, replacing an earlier one there.

    Args:
        minutes: time for everything, compiling the kernels included. Training gets what the rest leaves of it, and the
            number of steps is fitted to that unless `settings` say `steps=`.

    Raises:
        ConfigError: `output` holds something that is no run, or a setting is wrong.
    """
    if not 0 < minutes < math.inf:
        raise ConfigError(f"minutes must be positive, got {minutes}")
    _check_output(output)
    end = time.perf_counter() + 60 * minutes
    seconds: dict[str, float] = {}

    @contextmanager
    def section(title: str) -> Iterator[None]:
        console.print(f"\n{title}", style="bold")
        begun = time.perf_counter()
        yield
        seconds[title] = time.perf_counter() - begun

    recipe = dataclasses.replace(override(demo(), settings), name=_NAME)
    data = DataSpec()
    with section("Text: the standard library of this Python"):
        corpus = data.read(recipe)
        texts = {
            split: [document.read() for document in corpus.split(split)] for split in ("train", "validation", "test")
        }
        for split, documents in texts.items():
            console.print(f"{split:<11}{len(documents):>5} files {sum(map(len, documents)):>11,} bytes")

    rows: list[tuple[str, float]] = [("every byte alike", 8.0), ("gzip -9", _gzip(texts["test"]))]
    with section("Baselines: n-gram models of the same bytes, smoothing chosen on validation"):
        for order in _ORDERS:
            model = NGram(order).fit(texts["train"]).tune(texts["validation"])
            rows.append((f"{order}-gram, Kneser-Ney", model.bits_per_byte(texts["test"])))
            console.print(f"{rows[-1][0]}: {rows[-1][1]:.3f} bits per byte")

    limit = _TimeLimit(math.inf)
    if not any(setting.split("=")[0].strip() == "steps" for setting in settings):
        with section("Speed of this machine"):
            recipe, limit = _fitted(recipe, data, corpus, end, console)

    with section("Training"):
        if output.exists():
            _check_output(output)
            with locked(output):  # nobody else trains there now
                shutil.rmtree(output)
        run = train(recipe, data, output, console=console, corpus=corpus, callbacks=[limit])
        if limit.stopped_at:
            console.print(f"stopped at step {limit.stopped_at} of {recipe.steps}: this machine became slower")

    with section("Loading again with AutoModelForCausalLM.from_pretrained"):
        loaded = AutoModelForCausalLM.from_pretrained(run.model).eval()
        tokenizer = AutoTokenizer.from_pretrained(run.model)
        nparameters = sum(p.numel() for p in loaded.parameters())
        console.print(f"{type(loaded).__name__} from {run.model}: {nparameters:,} parameters, {recipe.layer_pattern!r}")

    with section("Evaluation of the loaded model on the test files"):
        found = evaluate(loaded, tokenize(corpus.test, tokenizer))
        rows.append((f"this model, {limit.stopped_at or recipe.steps:,} steps", found.bits_per_byte))
        for bucket in found.buckets:
            console.print(
                f"bytes {bucket.begin:>7,} to {bucket.end - 1:>7,}: {bucket.bits_per_token:.3f} bits per byte"
            )

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
    console.print(f"total {sum(seconds.values()):.0f} s; model, metrics and plot are in {output}")
    result = {"bits_per_byte": dict(rows), "seconds": seconds, "parameters": nparameters, "test": found.to_dict()}
    write_aside(output / "demo.json", json.dumps(result, indent=2) + "\n")


def _check_output(output: Path) -> None:
    """Raise ConfigError unless `output` is free or holds an earlier demonstration, which is all that is replaced."""
    if not is_run(output):
        check_new(output)
    elif not (output / "demo.json").is_file() and open_run(output).recipe.name != _NAME:
        raise ConfigError(f"{output} holds a run that is no demonstration, and is left alone; give another --output")


class _TimeLimit(TrainerCallback):
    """Ends a run that takes longer than its trial promised."""

    def __init__(self, end: float) -> None:
        self.end = end
        self.stopped_at = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        logged = state.global_step >= state.logging_steps
        if logged and time.perf_counter() > self.end and state.global_step < state.max_steps:
            self.stopped_at = state.global_step
            control.should_training_stop = True


def _fitted(recipe: Recipe, data: DataSpec, corpus: Corpus, end: float, console: Console) -> tuple[Recipe, _TimeLimit]:
    """The recipe with as many steps, up to its own number, as fit here before `end`; a short trial run tells."""
    with tempfile.TemporaryDirectory() as folder:
        trial = dataclasses.replace(recipe, steps=_TRIAL_STEPS, log_every=1, save_every=_TRIAL_STEPS, eval_every=0)
        run = train(trial, data, Path(folder) / "trial", console=Console(quiet=True), corpus=corpus)
        elapsed = [row["elapsed_s"] for row in read_metrics(run.metrics)]
    per_step = (elapsed[-1] - elapsed[1]) / (len(elapsed) - 2)  # the first steps also load kernels
    # Scoring the test files costs at most half a step on as many bytes; loading, plotting and generating are quick.
    end -= per_step / 2 * corpus.nbytes("test") / (recipe.batch_size * recipe.seqlen) + _REST_SECONDS
    left = end - time.perf_counter()
    steps = max(recipe.log_every, min(recipe.steps, int(0.95 * left / per_step)))
    console.print(f"{per_step:.2f} s per step of {recipe.batch_size * recipe.seqlen:,} bytes: {steps:,} steps")
    return dataclasses.replace(recipe, steps=steps, warmup_steps=min(recipe.warmup_steps, steps // 10)), _TimeLimit(end)


def _gzip(documents: Sequence[bytes]) -> float:
    text = b"".join(documents)
    return 8 * len(gzip.compress(text, 9)) / len(text)
