"""Which examples a run trains and is judged on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from seqlib.errors import ConfigError

from .prepare import generator_options, prepare
from .protocols import get_protocol
from .recall import RECALL, Stream, full_options, get_recall, make_batch
from .recipes import Recipe
from .store import SPLITS, Examples, fingerprint
from .synthetic import IGNORE, Batch
from .tasks import TASKS, TaskData

__all__ = ["DataSource", "Rows", "RunData", "described", "load_data", "reduced"]

_TEST_EXAMPLES = 2000
_HELD_OUT, _TEST = 1 << 32, 1 << 33  # added to a recipe's seed for data that training does not see


@dataclass(frozen=True)
class DataSource:
    """Where the examples of a run come from."""

    folder: str | None = None
    """Folder or archive; None makes them where the task can be generated, or asks `datasets`."""
    any_size: bool = False
    cache: str | None = None
    processes: int = 1

    def absolute(self) -> DataSource:
        """The same source, named so that it is found from every folder."""
        paths = [None if path is None else os.path.abspath(path) for path in (self.folder, self.cache)]
        return DataSource(paths[0], self.any_size, paths[1], self.processes)


@dataclass(frozen=True)
class RunData:
    """What a run trains and is judged on."""

    vocab_size: int
    pad: int | None
    seqlen: int
    train: Dataset
    validation: Examples | Batch
    test: Examples | Batch
    baselines: dict[str, float]
    name: str
    """Equal for equal examples (`described`)."""
    task: TaskData | None = None


class Rows(Dataset):
    """Indices; the collator cuts the examples out of the memory-mapped file a batch at a time."""

    def __init__(self, examples: Examples) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> int:
        return index


def load_data(recipe: Recipe, source: DataSource, *, baselines: bool = True) -> RunData:
    """The examples that a recipe names.

    Raises:
        ConfigError: options that do not exist, or a held-out set of one class, which cannot select a model.
        CorpusError: files that are missing or damaged.
    """
    if recipe.task in RECALL:
        task = get_recall(recipe.task)
        options = full_options(task, recipe.data)
        batches = recipe.steps * recipe.accumulation
        stream = Stream(task, recipe.data, seed=recipe.seed, batch_size=recipe.batch_size, batches=batches)
        held_out = make_batch(task, recipe.data, recipe.seed + _HELD_OUT, recipe.eval_examples)
        _refuse_one_answer(recipe, held_out.targets[held_out.targets != IGNORE])
        test = make_batch(task, recipe.data, recipe.seed + _TEST, _TEST_EXAMPLES)
        found, name = task.guesses(options), described(recipe.task, options)
        return RunData(task.vocab_size(options), None, options["seqlen"], stream, held_out, test, found, name)
    data = prepare(
        recipe.task,
        recipe.protocol,
        data=None if source.folder is None else Path(source.folder),
        generate=recipe.data if source.folder is None and TASKS[recipe.task].generates else None,
        any_size=source.any_size,
        cache=None if source.cache is None else Path(source.cache),
        processes=source.processes,
    )
    splits = data.splits
    validation = splits["validation"].sample(recipe.eval_examples)
    _refuse_one_answer(recipe, validation.labels)
    found = data.task.baselines(splits) if baselines else {}
    rows, name = Rows(splits["train"]), described(recipe.task, data.manifest)
    return RunData(data.vocab_size, data.pad, data.seqlen, rows, validation, splits["test"], found, name, data)


def _refuse_one_answer(recipe: Recipe, answers: Any) -> None:
    if len(np.unique(answers)) < 2:
        raise ConfigError(
            f"{recipe.task}: the held-out set of {recipe.eval_examples} examples has one class only, and would select "
            "a model that always gives it; raise eval_examples, or give other data"
        )


def described(task: str, facts: Mapping[str, Any]) -> str:
    """A short name of the examples: equal where every example is.

    Args:
        facts: manifest of prepared data, or all options of a synthetic task.
    """
    if task in RECALL:
        return fingerprint({"task": task, "options": dict(facts)})
    return fingerprint({"task": task, "splits": {split: facts["splits"][split]["digest"] for split in SPLITS}})


def reduced(task: str, manifest: Mapping[str, Any]) -> str:
    """How examples differ from the published data in size or difficulty, for people; empty where they do not."""
    if task not in TASKS:
        return ""
    counts = {split: manifest["splits"][split]["examples"] for split in SPLITS}
    lengths = [manifest["splits"][split]["lengths"] for split in SPLITS]
    options = manifest.get("generated")
    same_sizes = counts == dict(TASKS[task].sizes(get_protocol(manifest["protocol"]["name"])))
    same_kind = options is None or {**options, **counts} == {**generator_options(TASKS[task], {}), **counts}
    if same_sizes and same_kind:
        return ""
    shortest, longest = min(q["0"] for q in lengths), max(q["1"] for q in lengths)
    sizes = " + ".join(f"{counts[split]:,}" for split in SPLITS)
    return f"{sizes} examples of {shortest:,} to {longest:,} tokens"
