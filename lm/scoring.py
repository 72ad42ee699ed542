"""What `seqlib-lm evaluate` scores, and how far it is."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from seqlib.errors import ConfigError, CorpusError

from .corpus import read_corpus, read_documents
from .data import Tokens
from .documents import Document
from .runs import DataSpec, held_out, open_run, run_of, trained_on
from .show import plain_console, tell_skipped

__all__ = ["Following", "documents_of"]

_LINE_EVERY = 10.0  # seconds between lines where there is no terminal to draw a bar in


def documents_of(model: str, data: DataSpec, split: str | None, seed: int, console: Console) -> list[Document]:
    """The documents to score; tells what is left out.

    Args:
        data: names text; without sources it is the own text of the run.
        split: of that text; None: all that is named, or the test split of the own text.

    Raises:
        ConfigError: there is no text.
        CorpusError: nothing is left, because the run was trained on all of it.
    """
    if not data.sources:
        folder = run_of(model)
        if folder is None:
            raise ConfigError(f"{model} is no run folder that knows its test text; say which text to evaluate on")
        corpus = open_run(folder).corpus()
        return list(corpus.split(split or "test"))
    if split is not None:
        corpus = read_corpus(data.sources, seed=seed, suffixes=data.suffixes, column=data.column)
        documents, skipped = list(corpus.split(split)), corpus.skipped
    else:
        documents, skipped = read_documents(data.sources, suffixes=data.suffixes, column=data.column)
    tell_skipped(console, skipped)
    return documents if split == "train" else _unseen(model, documents, console)


def _unseen(model: str, documents: list[Document], console: Console) -> list[Document]:
    """Without those that the model was trained on, which would make it look better than it is."""
    trained = trained_on(model)
    if trained is None:
        if run_of(model) is not None:
            console.print("this run does not say which documents it was trained on; some may be among these")
        return documents
    unseen = held_out(documents, trained)
    if not unseen:
        raise CorpusError(
            f"{model} was trained on all {len(documents)} documents or parts of them; give other text, or leave the "
            "text out to score the test split, or ask for --split train"
        )
    if len(unseen) < len(documents):
        console.print(f"left out {len(documents) - len(unseen)} of {len(documents)} documents: trained on them")
    return unseen


class Following:
    """Bytes scored of all: a bar in a terminal, lines elsewhere, on standard error."""

    def __init__(self, tokens: Tokens, max_bytes: int | None) -> None:
        total = int(tokens.nbytes.sum())
        self.total, self.done, self.told = min(total, max_bytes or total), 0, time.perf_counter()
        self.console = plain_console(stderr=True)
        self.bar: Progress | None = None
        if sys.stderr.isatty():
            self.bar = Progress(
                BarColumn(), TextColumn("{task.completed:,}/{task.total:,} bytes"), TimeRemainingColumn(),
                console=self.console, transient=True,
            )  # fmt: skip
            self.task = self.bar.add_task("", total=self.total)

    def __enter__(self) -> Following:
        if self.bar:
            self.bar.start()
        return self

    def __call__(self, nbytes: int) -> None:
        self.done = min(self.total, self.done + nbytes)
        if self.bar:
            self.bar.update(self.task, completed=self.done)
        elif time.perf_counter() - self.told > _LINE_EVERY:
            self.told = time.perf_counter()
            self.console.print(f"{self.done:,}/{self.total:,} bytes scored")

    def __exit__(self, *_: Any) -> None:
        if self.bar:
            self.bar.stop()
