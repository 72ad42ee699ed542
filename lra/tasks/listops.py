"""ListOps as a task: released files or lists made here, and the shortcuts that come close without nesting."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from .. import lists
from ..baselines import best_per_key, majority
from ..protocols import Protocol
from ..store import SPLITS, Examples
from .base import Prepared, Task, check_labels, of_mega, read_mega

__all__ = ["ListOps"]

_FILES = {"train": "basic_train.tsv", "validation": "basic_val.tsv", "test": "basic_test.tsv"}
_CHECKED = 4000  # test lists that shortcuts are evaluated on


class ListOps(Task):
    """Value of a nested list of digits, from 0 to 9.

    Source: Nangia & Bowman 2018; Tay et al. 2020 (arXiv 2011.04006).
    """

    name: ClassVar[str] = "listops"
    title: ClassVar[str] = "ListOps"
    classes: ClassVar[int] = 10
    counts: ClassVar[Mapping[str, int]] = {"train": 96_000, "validation": 2_000, "test": 2_000}
    sources: ClassVar[tuple[str, ...]] = ("listops-1000", "listops", *_FILES.values())
    where: ClassVar[str] = (
        "basic_train.tsv, basic_val.tsv and basic_test.tsv in listops-1000/ (lra_release archive) or listops/, "
        "or --generate, which makes the same distribution"
    )
    generates: ClassVar[Mapping[str, Any]] = {
        "train": 96_000, "validation": 2_000, "test": 2_000, "max_depth": 10, "max_args": 10,
        "min_length": 500, "max_length": 2000,
    }  # fmt: skip

    def read(self, root: Path, protocol: Protocol) -> Prepared:
        for folder in ("listops-1000", "listops", "."):
            if (root / folder / _FILES["train"]).is_file():
                splits = {split: lists.read_tsv(root / folder / name) for split, name in _FILES.items()}
                return _prepared(splits, {"layout": "tsv"})  # whole: a list that loses its end has no value
        mega = read_mega(root / "listops", self.classes)
        if mega is None:
            raise self.missing(root)
        return of_mega(mega)

    def generate(self, options: Mapping[str, Any], seed: int, processes: int) -> Prepared:
        shape = lists.Shape(**{key: options[key] for key in ("max_depth", "max_args", "min_length", "max_length")})
        sizes = [int(options[split]) for split in SPLITS]
        found = lists.generate(sum(sizes), shape, seed=seed)
        splits, begin = {}, 0
        for split, size in zip(SPLITS, sizes):
            part = found[begin : begin + size]
            labels = [lists.evaluate(ids) for ids in part]
            rows = [np.frombuffer(ids, np.uint8) for ids in part]
            splits[split] = Examples.pack(rows, labels, vocab_size=len(lists.SYMBOLS))
            begin += size
        return _prepared(splits, {"layout": "generated"})

    def baselines(self, splits: Mapping[str, Examples]) -> dict[str, float]:
        train, test = splits["train"], splits["test"].sample(_CHECKED)
        if lists.SYMBOLS.index("]") < train.tokens.max():
            return super().baselines(splits)  # ids of another layout say nothing about operators
        keys = [np.array([lists.first_operator(part.sequence(i)) for i in range(len(part))]) for part in (train, test)]
        first, answers = best_per_key(keys[0], train.labels, keys[1], test.labels)
        found = {"majority class": majority(train, test), "first operator": first}
        guesses = [answers.get(operator, 0) for operator in range(4)]
        lists_ = [test.sequence(i).tolist() for i in range(len(test))]
        for depth in range(1, 9):
            values = np.array([lists.evaluate(ids, depth, guesses) for ids in lists_])
            found[f"lists to depth {depth}"] = float((values == test.labels).mean())
            if found[f"lists to depth {depth}"] == 1.0:
                break
        return found


def _prepared(splits: dict[str, Examples], facts: dict[str, Any]) -> Prepared:
    for part in splits.values():
        check_labels(Path("ListOps"), part.labels, 10)
    return Prepared(splits, len(lists.SYMBOLS), 0, facts)
