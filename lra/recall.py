"""The synthetic suite as tasks: sizes, vocabularies, what trivial answers score, endless seeded batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from seqlib.errors import ConfigError

from . import synthetic
from .options import Options, complete
from .synthetic import Batch, for_causal_lm

__all__ = ["RECALL", "RecallTask", "Stream", "full_options", "get_recall", "make_batch"]


@dataclass(frozen=True)
class RecallTask:
    """A generator with its sizes."""

    name: str
    make: Callable[..., Batch]
    defaults: dict[str, Any]
    """`seqlen` and the generator's own options."""
    vocab_size: Callable[[Options], int]
    guesses: Callable[[Options], dict[str, float]]
    """What trivial answers score, by name: the plateaus at which a model has learnt less than the task."""


RECALL: dict[str, RecallTask] = {
    task.name: task
    for task in (
        RecallTask(
            "mqar", synthetic.mqar, {"seqlen": 64, "pairs": 8, "vocab_size": 256, "power": 0.01, "random_filler": True},
            lambda o: o["vocab_size"],
            lambda o: {"any value": 2 / o["vocab_size"], "any value of the context": 1 / o["pairs"]},
        ),
        RecallTask(
            "selective_copying", synthetic.selective_copying, {"seqlen": 64, "tokens": 8, "vocab_size": 16},
            lambda o: o["vocab_size"], lambda o: {"any symbol": 1 / (o["vocab_size"] - 2)},
        ),
        RecallTask(
            "copying", synthetic.copying, {"seqlen": 64, "tokens": 8, "vocab_size": 16, "hold": 1},
            lambda o: o["vocab_size"], lambda o: {"any symbol": 1 / (o["vocab_size"] - 2)},
        ),
        RecallTask(
            "induction", synthetic.induction, {"seqlen": 64, "vocab_size": 16},
            lambda o: o["vocab_size"] + 1, lambda o: {"any symbol": 1 / o["vocab_size"]},
        ),
        RecallTask(
            "key_value", synthetic.key_value, {"seqlen": 64, "pairs": 8, "vocab_size": 64},
            lambda o: o["vocab_size"],
            lambda o: {"any value": 2 / o["vocab_size"], "any value of the context": 1 / o["pairs"]},
        ),
        RecallTask(
            "passkey", synthetic.passkey, {"seqlen": 128, "digits": 5, "vocab_size": 32},
            lambda o: o["vocab_size"], lambda o: {"any digit": 0.1},
        ),
        RecallTask(
            "needle", synthetic.needle, {"seqlen": 512, "digits": 5, "distractors": 0},
            lambda o: 256, lambda o: {"any digit": 0.1},
        ),
        RecallTask(
            "flip_flop", synthetic.flip_flop, {"seqlen": 64, "ignore": 0.8}, lambda o: 5, lambda o: {"either bit": 0.5},
        ),
        RecallTask(
            "parity", synthetic.parity, {"seqlen": 32, "every": True}, lambda o: 2, lambda o: {"either bit": 0.5},
        ),
    )
}  # fmt: skip


def get_recall(name: str) -> RecallTask:
    """A synthetic task by name."""
    if name not in RECALL:
        raise ConfigError(f"unknown synthetic task {name!r}; known: {', '.join(RECALL)}")
    return RECALL[name]


def full_options(task: RecallTask, options: Options) -> dict[str, Any]:
    """The task's options with `options` put over the defaults; `mix` is a list of such changes for a curriculum.

    Raises:
        ConfigError: an option that does not exist, or a value of another kind than its default.
    """
    plain = {key: value for key, value in options.items() if key != "mix"}
    full = complete(task.name, task.defaults, plain)
    mix = options.get("mix") or []
    if not isinstance(mix, Sequence) or not all(isinstance(entry, Mapping) for entry in mix):
        raise ConfigError(f"{task.name}: mix must be a list of objects with options, got {mix!r}")
    for entry in mix:
        complete(task.name, task.defaults, entry)
    return full | {"mix": list(mix)}


def make_batch(task: RecallTask, options: Options, seed: int, n: int, index: int = 0) -> Batch:
    """n examples. With `mix` in the options the entries take turns by `index`."""
    full = full_options(task, options)
    mix: Sequence[Options] = full.pop("mix") or [{}]
    full |= mix[index % len(mix)]
    return task.make(seed, n, full.pop("seqlen"), **full)


class Stream(Dataset):
    """Fresh examples for every step: batch i is a function of (seed, i), so a resumed run sees the same."""

    def __init__(self, task: RecallTask, options: Options, *, seed: int, batch_size: int, batches: int) -> None:
        self.task, self.options, self.seed = task, dict(options), seed
        self.batch_size, self.batches = batch_size, batches
        self._held: tuple[int, dict[str, Tensor]] | None = None
        self.batch(0)  # options that do not fit are found before a run begins

    def __len__(self) -> int:
        return self.batch_size * self.batches

    def batch(self, index: int) -> dict[str, Tensor]:
        """`input_ids` and `labels` of batch `index`."""
        if self._held is None or self._held[0] != index:
            seed = int(np.random.SeedSequence([self.seed, index]).generate_state(1)[0])
            made = make_batch(self.task, self.options, seed, self.batch_size, index)
            self._held = index, for_causal_lm(made)
        return self._held[1]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        batch, row = divmod(index, self.batch_size)
        return {name: tensor[row] for name, tensor in self.batch(batch).items()}
