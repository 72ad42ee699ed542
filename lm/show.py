"""What the command line prints: text that was found, runs, scores, recipes."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from rich.console import Console
from rich.table import Table

from seqlib.errors import ConfigError

from .corpus import Corpus
from .documents import SPLITS
from .recipes import RECIPES
from .runs import Run

__all__ = ["evaluation_table", "plain_console", "recipe_lines", "tell_corpus", "tell_run", "tell_skipped"]


def plain_console(stderr: bool = False) -> Console:
    """No markup, because names of files are printed; no wrapping, because lines may be read by programs."""
    return Console(markup=False, highlight=False, soft_wrap=True, stderr=stderr)


def tell_corpus(console: Console, corpus: Corpus) -> None:
    """How much text there is, and what was passed over."""
    parts = [f"{split} {len(corpus.split(split)):,} documents, {corpus.nbytes(split):,} bytes" for split in SPLITS]
    console.print("text: " + "; ".join(parts))
    tell_skipped(console, corpus.skipped)


def tell_skipped(console: Console, skipped: tuple[tuple[str, str], ...]) -> None:
    """What of the text was passed over, and why."""
    if skipped:
        shown = "; ".join(f"{name}: {reason}" for name, reason in skipped[:3])
        console.print(f"skipped {len(skipped)} ({shown}{'; ...' if len(skipped) > 3 else ''})")


def tell_run(console: Console, run: Run) -> None:
    """Where everything is that a run left behind."""
    for name, path in (("model", run.model), ("metrics", run.metrics), ("plot", run.plot)):
        if path.exists():
            console.print(f"{name}: {path}")
    if run.tensorboard.is_dir():
        console.print(f"curves: tensorboard --logdir {run.tensorboard}")


def evaluation_table(found: Any) -> Table:
    """Bits per byte and perplexity, then bits per token by position."""
    table = Table("position in document", "tokens", "bits per token", title=None)
    for bucket in found.buckets:
        table.add_row(f"{bucket.begin:,} - {bucket.end - 1:,}", f"{bucket.tokens:,}", f"{bucket.bits_per_token:.4f}")
    table.caption = (
        f"{found.documents:,} documents, {found.bytes:,} bytes\n"
        f"{found.bits_per_byte:.4f} bits per byte, perplexity {found.perplexity:.4f} per token"
    )
    return table


def recipe_lines(name: str | None) -> list[str]:
    """The recipes with what they are for, or the fields of one with their values."""
    if name is None:
        lines = [f"{each:<12} {(make.__doc__ or '').splitlines()[0]}" for each, make in RECIPES.items()]
        return [*lines, "", "fields of one: seqlib-lm recipes NAME; to change one: seqlib-lm train --set FIELD=VALUE"]
    if name not in RECIPES:
        raise ConfigError(f"unknown recipe {name!r}; known: {', '.join(RECIPES)}")
    recipe = RECIPES[name]()
    fields = [field.name for field in dataclasses.fields(recipe) if field.name != "name"]
    return [f"{field:<20} {json.dumps(getattr(recipe, field))}" for field in fields]
