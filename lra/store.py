"""Tokenised examples in memory-mapped Arrow files, so that a second start is instant."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from seqlib.errors import CorpusError
from seqlib.hf.keep import whole_folder

__all__ = ["SPLITS", "Examples", "cache_folder", "fingerprint", "load", "save"]

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Examples:
    """Labelled sequences of one split, end to end in one array.

    Args:
        tokens: (ntokens,) uint8 or uint16.
        offsets: (nsequences + 1,) int64, where each sequence begins.
        labels: (nexamples,) int16 classes.
        width: sequences per example: 1, or 2 for pairs.
    """

    tokens: NDArray[Any]
    offsets: NDArray[np.int64]
    labels: NDArray[np.int16]
    width: int = 1

    def __post_init__(self) -> None:
        if len(self.offsets) != len(self.labels) * self.width + 1:
            raise ValueError(f"{len(self.labels)} labels of {self.width} do not fit {len(self.offsets) - 1} sequences")

    @classmethod
    def pack(
        cls, rows: Sequence[NDArray[Any]], labels: Sequence[int] | NDArray[Any], *, vocab_size: int, width: int = 1
    ) -> Examples:
        """From one array per sequence.

        Raises:
            CorpusError: ids that two bytes do not hold.
        """
        if vocab_size > 1 << 16:
            raise CorpusError(f"the largest token id is {vocab_size - 1}; ids from 0 to 65,535 are allowed")
        dtype = np.uint8 if vocab_size <= 256 else np.uint16
        lengths = np.fromiter((len(row) for row in rows), np.int64, len(rows))
        offsets = np.concatenate([[0], lengths.cumsum()])
        tokens = np.concatenate(rows).astype(dtype) if rows else np.zeros(0, dtype)
        return cls(tokens, offsets, np.asarray(labels, np.int16), width)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(nexamples, width) tokens per sequence."""
        return np.diff(self.offsets).reshape(-1, self.width)

    def sequence(self, index: int, which: int = 0) -> NDArray[Any]:
        """Tokens of one sequence, a view."""
        at = index * self.width + which
        return self.tokens[self.offsets[at] : self.offsets[at + 1]]

    def take(self, index: NDArray[Any]) -> Examples:
        """The examples at `index`, copied."""
        at = (np.asarray(index)[:, None] * self.width + np.arange(self.width)).ravel()
        lengths = np.diff(self.offsets)[at]
        offsets = np.concatenate([[0], lengths.cumsum()])
        where = np.repeat(self.offsets[at] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Examples(self.tokens[where], offsets, self.labels[index], self.width)

    def sample(self, n: int, seed: int = 0) -> Examples:
        """n examples (all if there are fewer), drawn at random with the shares that the classes have here.

        The order of a file says nothing about who is in a sample: released files are sorted by label.
        """
        if n >= len(self):
            return self
        order = np.random.default_rng(seed).permutation(len(self))
        place = np.empty(len(self))  # of an example in its class, from 0 to 1
        for label in np.unique(self.labels):
            own = order[self.labels[order] == label]
            place[own] = (np.arange(len(own)) + 0.5) / len(own)
        return self.take(np.sort(order[np.argsort(place[order], kind="stable")[:n]]))

    def cut(self, seqlen: int) -> Examples:
        """Every sequence without what follows its first `seqlen` tokens."""
        if not len(self) or self.lengths.max() <= seqlen:
            return self
        lengths = np.diff(self.offsets).clip(max=seqlen)
        offsets = np.concatenate([[0], lengths.cumsum()])
        where = np.repeat(self.offsets[:-1] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Examples(self.tokens[where], offsets, self.labels, self.width)

    def digest(self) -> str:
        """A short name of the contents, equal where every token and label is."""
        name = hashlib.sha256(str((self.width, len(self))).encode())
        for array in (self.tokens.astype(np.uint16, copy=False), self.offsets, self.labels):
            name.update(np.ascontiguousarray(array).view(np.uint8).data)
        return name.hexdigest()[:16]


def cache_folder(override: Path | None = None) -> Path:
    """Where prepared data lives: beside the caches of `datasets`, unless a folder is given."""
    if override is not None:
        return override
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "seqlib-lra"


def fingerprint(values: Mapping[str, Any]) -> str:
    """A short name of what decides the contents of a cache."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def save(folder: Path, splits: Mapping[str, Examples], manifest: Mapping[str, Any]) -> None:
    """Write splits and manifest aside and rename the folder when it is whole."""
    with whole_folder(folder, replace=not (folder / "manifest.json").is_file()) as aside:
        for name, examples in splits.items():
            _write(aside / f"{name}.arrow", examples)
        (aside / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def load(folder: Path) -> tuple[dict[str, Examples], dict[str, Any]] | None:
    """Splits (memory-mapped) and manifest, or None where nothing is prepared.

    Raises:
        CorpusError: a file is missing or damaged, or has another number of examples than were written.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text())
        splits = {name: _read(folder / f"{name}.arrow") for name in SPLITS}
        expected = {name: manifest["splits"][name]["examples"] for name in SPLITS}
    except (pa.ArrowInvalid, OSError, ValueError, LookupError, TypeError) as error:
        raise _damaged(folder, repr(error)) from error
    for name, part in splits.items():
        if len(part) != expected[name] or part.offsets[-1] != len(part.tokens):
            raise _damaged(folder, f"{name} has {len(part):,} examples, {expected[name]:,} were written")
    return splits, manifest


def _damaged(folder: Path, reason: str) -> CorpusError:
    return CorpusError(f"prepared data in {folder} is damaged ({reason}); remove the folder and prepare it again")


def _write(path: Path, examples: Examples) -> None:
    """A stream of token lists and labels, a row per sequence; `datasets.Dataset.from_file` opens it too."""
    lists = pa.LargeListArray.from_arrays(pa.array(examples.offsets), pa.array(examples.tokens))
    labels = pa.array(np.repeat(examples.labels, examples.width))
    table = pa.table({"input_ids": lists, "label": labels})
    table = table.replace_schema_metadata({"width": str(examples.width)})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=max(1, len(table)))


def _read(path: Path) -> Examples:
    with pa.memory_map(str(path)) as file:
        table = pa.ipc.open_stream(file).read_all()
    width = int(table.schema.metadata[b"width"])
    lists, labels = table["input_ids"].chunk(0), table["label"].chunk(0).to_numpy()
    return Examples(lists.values.to_numpy(), lists.offsets.to_numpy(), labels[::width], width)
