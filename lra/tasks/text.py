"""IMDB reviews as bytes or characters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from seqlib.errors import CorpusError

from ..protocols import Protocol
from ..store import Examples
from .base import Prepared, Task, of_mega, read_mega, seen

__all__ = ["Text", "encode_texts"]

_MIN_COUNT = 15  # characters that occur less often in training text are unknown, as in the S4 family


class Text(Task):
    """Whether a review is positive (1) or negative (0).

    Source: Maas et al. 2011; Tay et al. 2020 (arXiv 2011.04006), byte level.
    """

    name: ClassVar[str] = "text"
    title: ClassVar[str] = "Text (IMDB)"
    classes: ClassVar[int] = 2
    counts: ClassVar[Mapping[str, int]] = {"train": 22_500, "validation": 2_500, "test": 25_000}
    sources: ClassVar[tuple[str, ...]] = tuple(
        f"{folder}{part}/{label}"
        for folder in ("aclImdb/", "imdb/", "") for part in ("train", "test") for label in ("pos", "neg")
    ) + tuple(f"{folder}/{part}" for folder in ("text", "imdb") for part in ("input", "label"))  # fmt: skip
    hub: ClassVar[str] = "stanfordnlp/imdb"
    where: ClassVar[str] = (
        "aclImdb/{train,test}/{pos,neg}/*.txt (aclImdb_v1.tar.gz of ai.stanford.edu/~amaas/data/sentiment, unpacked), "
        "text/input/train.src of the layout of mega, or the data set 'imdb' in the cache of `datasets`"
    )

    def sizes(self, protocol: Protocol) -> Mapping[str, int]:
        whole = {"train": 25_000, "validation": 25_000, "test": 25_000}
        return self.counts if protocol.text_validation == "held-out" else whole

    def read(self, root: Path, protocol: Protocol) -> Prepared:
        mega = read_mega(root / "text", self.classes) or read_mega(root / "imdb", self.classes)
        if mega is not None:
            return of_mega(mega, protocol.seqlen["text"])
        folder = next((p for p in (root / "aclImdb", root / "imdb", root) if (p / "train" / "pos").is_dir()), None)
        if folder is None:
            raise self.missing(root)
        return _prepared({split: _folder(folder / split) for split in ("train", "test")}, protocol, "aclImdb")

    def read_hub(self, rows: Any, protocol: Protocol) -> Prepared:
        found = {
            split: ([text.encode() for text in rows[split]["text"]], np.array(rows[split]["label"]))
            for split in ("train", "test")
        }
        return _prepared(found, protocol, "datasets")


def _prepared(found: Mapping[str, tuple[list[bytes], NDArray[np.int64]]], protocol: Protocol, layout: str) -> Prepared:
    """Reviews in the splits and units of a protocol."""
    (train, train_labels), (test, test_labels) = found["train"], found["test"]
    raw = {"train": (train, train_labels), "test": (test, test_labels)}
    order = np.random.default_rng(0).permutation(len(train))
    held = len(train) // 10
    if protocol.text_validation == "held-out":
        raw["validation"] = ([train[i] for i in order[:held]], train_labels[order[:held]])
        raw["train"] = ([train[i] for i in order[held:]], train_labels[order[held:]])
    else:
        raw["validation"] = raw["test"]
    ids, vocab = encode_texts({k: v[0] for k, v in raw.items()}, protocol.units, protocol.seqlen["text"])
    splits = {k: Examples.pack(ids[k], raw[k][1], vocab_size=vocab) for k in raw}
    return Prepared(splits, vocab, 0, {"layout": layout, "units": protocol.units})


def encode_texts(
    texts: Mapping[str, Sequence[bytes]], units: str, seqlen: int
) -> tuple[dict[str, list[NDArray[Any]]], int]:
    """Token ids per text, cut to `seqlen`, and the vocabulary size; 0 is padding.

    bytes: id = byte + 1. characters: 1 unknown, then those that occur at least 15 times in the training texts, by
    frequency.
    """
    if units == "bytes":
        return {k: [_bytes(t[:seqlen]) for t in part] for k, part in texts.items()}, 257
    decoded = {k: [t.decode("utf-8", errors="replace") for t in part] for k, part in texts.items()}
    counts: Counter[str] = Counter()
    for text in decoded["train"]:
        counts.update(text)
    known = [c for c, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if count >= _MIN_COUNT]
    index = {c: i + 2 for i, c in enumerate(known)}

    def encoded(text: str) -> NDArray[Any]:
        return np.array([index.get(c, 1) for c in text[:seqlen]], np.uint16)

    return {k: [encoded(t) for t in part] for k, part in decoded.items()}, len(known) + 2


def _bytes(text: bytes) -> NDArray[Any]:
    return np.frombuffer(text, np.uint8).astype(np.uint16) + 1


def _folder(folder: Path) -> tuple[list[bytes], NDArray[np.int64]]:
    texts: list[bytes] = []
    labels: list[int] = []
    for label, name in enumerate(("neg", "pos")):
        files = sorted(seen(folder / name, ".txt"), key=lambda p: [int(n) for n in p.stem.split("_") if n.isdigit()])
        if not files:
            raise CorpusError(f"{folder / name} holds no .txt files; unpack the archive again")
        for path in files:
            data = path.read_bytes()
            if not data.strip():
                raise CorpusError(f"{path} is empty; unpack the archive again")
            texts.append(data)
            labels.append(label)
    return texts, np.array(labels)
