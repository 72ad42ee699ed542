"""Where text comes from: files, folders, data sets and the standard library, as documents split three ways."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seqlib.errors import CorpusError

__all__ = ["SPLITS", "Corpus", "Document", "read_corpus", "read_documents", "stdlib_corpus"]

SPLITS = ("train", "validation", "test")
UNDECODABLE = 0.1  # share of bytes that are not UTF-8 above which a file counts as binary; Latin-1 prose stays below


@dataclass(frozen=True)
class Document:
    """One text. Its bytes are read when asked for, so a corpus larger than memory is a list of small objects."""

    name: str
    digest: str
    nbytes: int
    load: Callable[[], bytes] = field(repr=False, compare=False)

    @classmethod
    def of(cls, name: str, data: bytes, load: Callable[[], bytes] | None = None) -> Document:
        return cls(name, hashlib.sha256(data).hexdigest(), len(data), load or (lambda: data))

    def read(self) -> bytes:
        """The bytes; an error if they are not those that were seen first."""
        data = self.load()
        if len(data) != self.nbytes or hashlib.sha256(data).hexdigest() != self.digest:
            raise CorpusError(f"{self.name} changed while it was being used; start again")
        return data


@dataclass(frozen=True)
class Corpus:
    """Documents of the three splits, and what was left out and why."""

    train: tuple[Document, ...]
    validation: tuple[Document, ...]
    test: tuple[Document, ...]
    skipped: tuple[tuple[str, str], ...] = ()

    def split(self, name: str) -> tuple[Document, ...]:
        if name not in SPLITS:
            raise CorpusError(f"unknown split {name!r}; known: {', '.join(SPLITS)}")
        return getattr(self, name)

    def nbytes(self, split: str) -> int:
        return sum(document.nbytes for document in self.split(split))

    @property
    def digest(self) -> str:
        """A name for exactly these documents, split in exactly this way."""
        text = "\n".join(f"{split} {d.digest}" for split in SPLITS for d in self.split(split))
        return hashlib.sha256(text.encode()).hexdigest()


def read_corpus(
    sources: Sequence[str | Path],
    *,
    seed: int = 0,
    held_out: float = 0.05,
    suffixes: Sequence[str] = (),
    column: str | None = None,
) -> Corpus:
    """Read text and split it by document.

    Args:
        sources: any mix of text files, folders (searched recursively; hidden files and binary files are passed over)
            and data set names ("org/name" or "org/name:config", or a folder written by `save_to_disk`). Splits that a
            data set brings along are kept; everything else is split here.
        seed: decides, with its name and content, which split a document falls into.
        held_out: share of the bytes for validation, and the same again for test, 0 < held_out < 0.5.
        suffixes: take only files of folders whose names end so (".py"); empty takes every text file.
        column: the column of data sets that holds the text; None takes "text" or the only column of strings.

    Raises:
        CorpusError: a source does not exist, nothing readable is left, or there is too little of it.
    """
    if not 0 < held_out < 0.5:
        raise CorpusError(f"held_out must lie between 0 and 0.5, got {held_out}")
    loose, given, skipped = _gather(sources, suffixes, column)
    parts = _split(_distinct(loose, skipped), seed, held_out, given)
    return _corpus(parts, skipped)


def read_documents(
    sources: Sequence[str | Path], *, suffixes: Sequence[str] = (), column: str | None = None
) -> list[Document]:
    """Every document of `sources`, as `read_corpus` finds them, without splitting."""
    loose, given, _ = _gather(sources, suffixes, column)
    return loose + [document for documents in given.values() for document in documents]


def stdlib_corpus(*, seed: int = 0, train_bytes: int = 4_000_000, held_out_bytes: int = 200_000) -> Corpus:
    """The sources of Python's own standard library, split by file: real text that every machine with Python has.

    Tests, character tables and generated help are left out. Files are taken in a seeded order until the sizes are
    reached, test first.

    Raises:
        CorpusError: this Python comes without its sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {
        "site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data",
    }  # fmt: skip
    documents: list[Document] = []
    skipped: list[tuple[str, str]] = []
    for file in _files(root, [".py"], left_out):
        _take_file(file, file.relative_to(root).as_posix(), documents, skipped)
    parts: dict[str, list[Document]] = {split: [] for split in SPLITS}
    room = {"test": held_out_bytes, "validation": held_out_bytes, "train": train_bytes}
    for document in _shuffled(_distinct(documents, skipped), seed):
        split = next((split for split in room if document.nbytes <= room[split]), None)
        if split is not None:
            parts[split].append(document)
            room[split] -= document.nbytes
    if not all(parts.values()):
        raise CorpusError(
            f"found {len(documents)} source files of the standard library under {root}; this Python seems to come "
            "without its sources: use another one, or train on your own text with `seqlib-lm train PATH`"
        )
    return _corpus(parts, skipped)


def _corpus(parts: dict[str, list[Document]], skipped: list[tuple[str, str]]) -> Corpus:
    return Corpus(tuple(parts["train"]), tuple(parts["validation"]), tuple(parts["test"]), tuple(skipped))


def _gather(
    sources: Sequence[str | Path], suffixes: Sequence[str], column: str | None
) -> tuple[list[Document], dict[str, list[Document]], list[tuple[str, str]]]:
    """Documents without a split, documents that came with one, and what was passed over."""
    given: dict[str, list[Document]] = {split: [] for split in SPLITS}
    loose: list[Document] = []
    skipped: list[tuple[str, str]] = []
    for source in map(str, sources):
        path = Path(source)
        if path.is_file():
            _take_file(path, path.name, loose, skipped)
        elif path.is_dir() and not _is_saved_dataset(path):
            for file in _files(path, suffixes):
                _take_file(file, file.relative_to(path).as_posix(), loose, skipped)
        else:
            for split, documents in _dataset(source, column, skipped).items():
                given.get(split, loose).extend(documents)
    if not loose and not any(given.values()):
        raise CorpusError(_nothing_left(sources, skipped))
    return loose, given, skipped


def _distinct(documents: list[Document], skipped: list[tuple[str, str]]) -> list[Document]:
    """The first of each group of equal documents, so that none is trained on and tested with."""
    first: dict[str, Document] = {}
    for document in documents:
        kept = first.setdefault(document.digest, document)
        if kept is not document:
            skipped.append((document.name, f"same bytes as {kept.name}"))
    return list(first.values())


def why_not_text(data: bytes) -> str | None:
    """Why these bytes are no text, None if they are."""
    if not data:
        return "empty"
    if b"\0" in data:
        return "binary (holds NUL bytes)"
    lost = len(data) - len(data.decode("utf-8", "ignore").encode())
    if lost > UNDECODABLE * len(data):
        return f"binary ({lost / len(data):.0%} of its bytes are not UTF-8)"
    return None


def _files(root: Path, suffixes: Sequence[str], left_out: Set[str] = frozenset()) -> Iterator[Path]:
    """The files below `root` in a fixed order, without hidden ones and without folders of the names `left_out`."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in {"__pycache__"} | left_out)
        for name in sorted(names):
            if not name.startswith(".") and (not suffixes or name.endswith(tuple(suffixes))):
                yield Path(folder, name)


def _take_file(path: Path, name: str, into: list[Document], skipped: list[tuple[str, str]]) -> None:
    try:
        data = path.read_bytes()
    except OSError as error:
        skipped.append((name, error.strerror or "unreadable"))
        return
    reason = why_not_text(data)
    if reason is None:
        into.append(Document.of(name, data, path.read_bytes))
    else:
        skipped.append((name, reason))


def _is_saved_dataset(path: Path) -> bool:
    return any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json"))


def _dataset(source: str, column: str | None, skipped: list[tuple[str, str]]) -> dict[str, list[Document]]:
    """Documents of every split of a data set, by the split's name."""
    import datasets

    if Path(source).is_dir():
        loaded = datasets.load_from_disk(source)
    else:
        name, _, config = source.partition(":")
        if not name or name.startswith(("/", ".", "~")) or name.count("/") > 1:
            raise CorpusError(f"{source!r} does not exist; give a text file, a folder or the name of a data set")
        try:
            loaded = datasets.load_dataset(name, config or None)
        except (OSError, ValueError, RuntimeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CorpusError(
                f"{source!r} is no file and no folder here, and no data set of that name could be loaded: {reason}"
            ) from error
    splits = loaded if isinstance(loaded, dict) else {"all": loaded}
    return {split: list(_rows(f"{source}/{split}", table, column, skipped)) for split, table in splits.items()}


def _rows(name: str, table: Any, column: str | None, skipped: list[tuple[str, str]]) -> Iterator[Document]:
    strings = [c for c, kind in table.features.items() if getattr(kind, "dtype", "") in ("string", "large_string")]
    column = column or ("text" if "text" in strings else strings[0] if len(strings) == 1 else None)
    if column not in strings:
        raise CorpusError(f"{name}: name the text column with --column, one of: {', '.join(strings) or '(no strings)'}")

    def load(row: int) -> Callable[[], bytes]:
        return lambda: table[row][column].encode()  # noqa: PLW0108 - a row is read when it is wanted, not now

    for row, text in enumerate(table[column]):
        if text:
            yield Document.of(f"{name}/{row}", text.encode(), load(row))
        else:
            skipped.append((f"{name}/{row}", "empty"))


def _shuffled(documents: Iterable[Document], seed: int) -> list[Document]:
    """An order that depends on seed, names and contents only, so that it is the same on every machine."""
    return sorted(documents, key=lambda d: hashlib.sha256(f"{seed} {d.name} {d.digest}".encode()).digest())


def _split(
    loose: list[Document], seed: int, held_out: float, given: dict[str, list[Document]]
) -> dict[str, list[Document]]:
    """Fill the splits that were not given: with whole documents of `loose`, or the end of a long one if none fits."""
    parts = {split: list(documents) for split, documents in given.items()}
    wanted = [split for split in ("test", "validation") if not parts[split]]
    if wanted:
        loose, parts["train"] = loose + parts["train"], []
    share = int(held_out * sum(d.nbytes for d in loose))
    room = dict.fromkeys(wanted, share)
    for document in _shuffled(loose, seed):
        split = next((split for split in wanted if document.nbytes <= room[split]), "train")
        parts[split].append(document)
        if split in room:
            room[split] -= document.nbytes
    for split in wanted:
        if not parts[split]:
            longest = max(parts["train"], key=lambda d: d.nbytes, default=None)
            if longest is None or not 0 < share < longest.nbytes:
                total = sum(d.nbytes for d in loose)
                raise CorpusError(f"{total} bytes are too few to split into train, validation and test; add text")
            at = parts["train"].index(longest)
            parts["train"][at], tail = _cut(longest, longest.nbytes - share)
            parts[split].append(tail)
    if not parts["train"]:
        raise CorpusError("there is no text to train on, only held-out splits; add text")
    return parts


def _cut(document: Document, at: int) -> tuple[Document, Document]:
    """Head and tail of a document, cut after a line end shortly before `at`, or at least between two characters."""
    data = document.read()
    at = data.rfind(b"\n", max(0, at - 1000), at) + 1 or at
    while at > 1 and data[at] & 0xC0 == 0x80:
        at -= 1
    head, tail = data[:at], data[at:]
    return (
        Document.of(f"{document.name}[:{at}]", head, lambda: document.read()[:at]),
        Document.of(f"{document.name}[{at}:]", tail, lambda: document.read()[at:]),
    )


def _nothing_left(sources: Sequence[str | Path], skipped: list[tuple[str, str]]) -> str:
    where = ", ".join(map(str, sources)) or "(nothing)"
    if not skipped:
        return f"found no text in {where}; give text files or folders that hold some"
    shown = "; ".join(f"{name}: {reason}" for name, reason in skipped[:5])
    more = f"; and {len(skipped) - 5} more" if len(skipped) > 5 else ""
    return f"found no text in {where}; skipped {len(skipped)} files ({shown}{more})"
