"""AAN: do two papers cite each other?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from seqlib.errors import CorpusError

from ..protocols import Protocol
from ..store import Examples
from .base import Prepared, Task, of_mega, read_mega
from .text import encode_texts

__all__ = ["Retrieval"]

_FILES = {"train": "new_aan_pairs.train.tsv", "validation": "new_aan_pairs.eval.tsv", "test": "new_aan_pairs.test.tsv"}


class Retrieval(Task):
    """Whether one of two papers cites the other (1), both read by the same model.

    Source: Radev et al. 2013; Tay et al. 2020 (arXiv 2011.04006).
    """

    name: ClassVar[str] = "retrieval"
    title: ClassVar[str] = "Retrieval (AAN)"
    classes: ClassVar[int] = 2
    width: ClassVar[int] = 2
    counts: ClassVar[Mapping[str, int]] = {"train": 147_086, "validation": 18_090, "test": 17_437}
    sources: ClassVar[tuple[str, ...]] = (
        *(f"{folder}{name}" for folder in ("tsv_data/", "aan/", "") for name in _FILES.values()), "retrieval",
    )  # fmt: skip
    where: ClassVar[str] = (
        "new_aan_pairs.{train,eval,test}.tsv in tsv_data/ (lra_release archive), aan/ or the folder itself, or "
        "retrieval/input/train.src and retrieval/input1/train.src of the layout of mega"
    )

    def read(self, root: Path, protocol: Protocol) -> Prepared:
        folders = [root / name for name in ("tsv_data", "aan", ".")]
        folder = next((folder for folder in folders if (folder / _FILES["train"]).is_file()), None)
        if folder is None:
            mega = read_mega(root / self.name, self.classes, width=2)
            if mega is None:
                raise self.missing(root)
            return of_mega(mega, protocol.seqlen["retrieval"])
        rows = {split: _read(folder / name) for split, name in _FILES.items()}
        texts = {split: [text for pair in pairs for text in pair] for split, (pairs, _) in rows.items()}
        ids, vocab = encode_texts(texts, protocol.units, protocol.seqlen["retrieval"])
        splits = {k: Examples.pack(ids[k], labels, vocab_size=vocab, width=2) for k, (_, labels) in rows.items()}
        return Prepared(splits, vocab, 0, {"layout": "tsv", "units": protocol.units})


def _read(path: Path) -> tuple[list[tuple[bytes, bytes]], list[int]]:
    """Pairs and labels; tabs separate five columns and quotes mean nothing."""
    if not path.is_file():
        raise CorpusError(f"{path} is missing beside the other splits")
    pairs: list[tuple[bytes, bytes]] = []
    labels: list[int] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                raise CorpusError(f"{path}:{number}: no line end: the file is cut off")
            cells = line.rstrip(b"\r\n").split(b"\t")
            if len(cells) != 5:
                raise CorpusError(
                    f"{path}:{number}: expected label, id1, id2, text1, text2, found {len(cells)} columns"
                    + ("; the files with ids only lack the texts" if len(cells) == 3 else "")
                )
            if cells[0] not in (b"0.0", b"1.0", b"0", b"1"):
                raise CorpusError(f"{path}:{number}: the label must be 0.0 or 1.0, got {cells[0][:20]!r}")
            if not cells[3] or not cells[4]:
                raise CorpusError(f"{path}:{number}: a text of the pair is empty")
            pairs.append((cells[3], cells[4]))
            labels.append(int(float(cells[0])))
    return pairs, labels
