"""What a task is: examples in three splits, and the trivial answers to compare with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from seqlib.errors import CorpusError

from ..baselines import bag_of_tokens, majority
from ..protocols import Protocol
from ..store import SPLITS, Examples

__all__ = [
    "NotHere", "Prepared", "Task", "TaskData", "check_counts", "check_labels", "of_mega", "read_mega", "read_text",
    "seen", "split_order",
]  # fmt: skip

MEGA_SPLITS = {"train": "train", "validation": "valid", "test": "test"}


class NotHere(CorpusError):
    """A folder holds nothing of a task."""


@dataclass(frozen=True)
class Prepared:
    """What a reader or generator hands over."""

    splits: dict[str, Examples]
    vocab_size: int
    pad: int | None
    facts: dict[str, Any]
    """Where the examples come from, for the manifest."""


@dataclass(frozen=True)
class TaskData:
    """Prepared examples of one task under one protocol."""

    task: Task
    splits: dict[str, Examples]
    manifest: dict[str, Any]

    @property
    def vocab_size(self) -> int:
        return self.manifest["vocab_size"]

    @property
    def pad(self) -> int | None:
        return self.manifest["pad"]

    @property
    def seqlen(self) -> int:
        """The longest sequence."""
        return max(int(part.lengths.max()) for part in self.splits.values())


class Task(ABC):
    """A classification task over sequences, or pairs of them."""

    name: ClassVar[str]
    title: ClassVar[str]
    classes: ClassVar[int]
    width: ClassVar[int] = 1
    counts: ClassVar[Mapping[str, int]]
    """Published sizes of the splits."""
    where: ClassVar[str]
    """Which files are needed and where they come from."""
    sources: ClassVar[tuple[str, ...]]
    """Files and folders that `read` looks into, from its root; nothing else decides what it returns."""
    hub: ClassVar[str | None] = None
    """Name of the data set for `datasets`, where there is one."""
    generates: ClassVar[Mapping[str, Any]] = {}
    """Options of `generate` with their defaults; empty where data cannot be made."""

    @abstractmethod
    def read(self, root: Path, protocol: Protocol) -> Prepared:
        """Examples from local files under `root`, in whichever published layout they have.

        Raises:
            CorpusError: nothing of this task is there, or a file is damaged; names file and line.
        """

    def read_hub(self, rows: Any, protocol: Protocol) -> Prepared:
        """Examples from the data set `hub`, as `datasets.load_dataset` returns it."""
        raise self.missing(None)

    def generate(self, options: Mapping[str, Any], seed: int, processes: int) -> Prepared:
        """Examples made here."""
        raise CorpusError(f"{self.name} cannot be generated; it needs files: {self.where}")

    def baselines(self, splits: Mapping[str, Examples]) -> dict[str, float]:
        """Accuracies on test data of answers that need no sequence model, fitted on training data."""
        train, test = splits["train"], splits["test"]
        return {
            "majority class": majority(train, test),
            "bag of tokens, linear": bag_of_tokens(train, test, self.classes),
        }

    def sizes(self, protocol: Protocol) -> Mapping[str, int]:
        """Published sizes of the splits under a protocol."""
        return self.counts

    def missing(self, root: Path | None) -> NotHere:
        """The error for data that is not there."""
        where = "is given" if root is None else f"under {root}"
        return NotHere(f"no {self.title} data {where}. It needs {self.where}")


def check_counts(sizes: Mapping[str, int], splits: Mapping[str, Examples], where: Path) -> None:
    """Raise unless the splits have their published sizes."""
    for split in SPLITS:
        found, expected = len(splits[split]), sizes[split]
        if found != expected:
            raise CorpusError(
                f"{where}: {split} has {found:,} examples, the published data {expected:,}; the copy is incomplete or "
                "of another set (pass --any-size to take it as it is)"
            )


def check_labels(path: Path, labels: NDArray[Any], classes: int) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        raise CorpusError(f"{path}:{wrong[0] + 1}: label {labels[wrong[0]]} is out of range 0 .. {classes - 1}")


def split_order(n: int, counts: tuple[int, int], rule: str) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Indices of train, validation and test examples of a set without splits of its own."""
    if rule == "torch-42":
        import torch

        order = torch.randperm(n, generator=torch.Generator().manual_seed(42)).numpy()
    else:
        order = np.arange(n) if rule == "order" else np.random.default_rng(0).permutation(n)
    held, test = counts
    return order[: n - held - test], order[n - held - test : n - test], order[n - test :]


def read_mega(folder: Path, classes: int, *, width: int = 1, image: int | None = None) -> dict[str, Examples] | None:
    """The layout of facebookresearch/mega: integers in input/<split>.src, labels in label/<split>.label.

    Args:
        width: 2 for pairs, whose second texts are in input1/<split>.src.
        image: number of pixels, 0 .. 255, that every line must have; None for text.
    """
    if not (folder / "input" / "train.src").is_file():
        return None
    splits = {}
    for split, name in MEGA_SPLITS.items():
        sources = [folder / kind / f"{name}.src" for kind in ("input", "input1")[:width]]
        target = folder / "label" / f"{name}.label"
        for path in (*sources, target):
            if not path.is_file():
                raise CorpusError(f"{path} is missing; the folder has the layout of mega but not all of its files")
        columns = [_numbered(source, image) for source in sources]
        labels = [_integers(target, i, line) for i, line in enumerate(read_text(target).splitlines(), 1)]
        for source, rows in zip(sources, columns):
            if len(rows) != len(labels):
                raise CorpusError(f"{source} has {len(rows)} lines and {target} {len(labels)}; they must pair up")
        flat = np.array([label[0] if len(label) == 1 else -1 for label in labels])
        check_labels(target, flat, classes)
        rows = [row for rows_of_one in zip(*columns) for row in rows_of_one]
        splits[split] = Examples.pack(rows, flat, vocab_size=1 + max(int(row.max()) for row in rows), width=width)
    return splits


def of_mega(splits: dict[str, Examples], seqlen: int | None = None) -> Prepared:
    """Texts in the layout of mega, cut to `seqlen`; padding is an id of its own."""
    vocab = 1 + max(int(part.tokens.max()) for part in splits.values() if len(part))
    cut = splits if seqlen is None else {split: part.cut(seqlen) for split, part in splits.items()}
    return Prepared(cut, vocab + 1, vocab, {"layout": "mega"})


def seen(folder: Path, suffix: str) -> list[Path]:
    """Files of a folder with a suffix, without hidden ones, which archivers and desktops leave behind."""
    return [path for path in folder.glob(f"*{suffix}") if not path.name.startswith(".")]


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        CorpusError: it is not UTF-8.
    """
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is no text in UTF-8 (byte {error.start}); unpack the archive again") from error


def _numbered(path: Path, image: int | None) -> list[NDArray[np.int64]]:
    rows = [_integers(path, i, line) for i, line in enumerate(read_text(path).splitlines(), 1)]
    for number, row in enumerate(rows, 1):
        if image is not None and (len(row) != image or row.max() > 255):
            raise CorpusError(
                f"{path}:{number}: expected {image} pixels from 0 to 255, found {len(row)}, the largest {row.max()}"
            )
    return rows


def _integers(path: Path, number: int, line: str) -> NDArray[np.int64]:
    try:
        values = np.array([int(word) for word in line.split()], np.int64)
    except (ValueError, OverflowError) as error:
        raise CorpusError(f"{path}:{number}: not integers ({error})") from error
    if not len(values) or values.min() < 0:
        raise CorpusError(f"{path}:{number}: expected one or more integers >= 0, got {line[:40]!r}")
    return values
