"""Where text comes from: files, folders, data sets and the standard library, as documents split three ways."""

from __future__ import annotations

import gzip
import hashlib
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from seqlib.errors import ConfigError, CorpusError
from seqlib.hf.runs import is_run

from .documents import SPLITS, Document, Skipped
from .tables import data_set, is_saved, is_table, read_table

__all__ = ["SPLITS", "Corpus", "Document", "read_corpus", "read_documents", "stdlib_corpus"]

UNDECODABLE = 0.1  # share of bytes that are not UTF-8 above which a file counts as binary; Latin-1 prose stays below


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
        sources: any mix of text files (.gz unpacked; .jsonl and .parquet hold a document per row), folders (searched
            recursively; hidden files, binary files and runs are passed over) and data set names ("org/name" or
            "org/name:config", or a folder written by `save_to_disk`). Splits that a data set brings along are kept;
            everything else is split here. No text stands in two splits.
        seed: decides, with its name and content, which split a document falls into.
        held_out: share of the bytes for validation, and the same again for test, 0 < held_out < 0.5.
        suffixes: take only files of folders whose names end so (".py"); empty takes every text file.
        column: the column of data sets, .jsonl and .parquet that holds the text; None takes "text" or the only
            column of strings.

    Raises:
        CorpusError: a source does not exist, nothing readable is left, or there is too little of it.
    """
    if not 0 < held_out < 0.5:
        raise CorpusError(f"held_out must lie between 0 and 0.5, got {held_out}")
    loose, given, skipped = _gather(sources, suffixes, column)
    loose, given = _apart(_distinct(loose, skipped), given, skipped)
    return _corpus(_split(loose, seed, held_out, given), skipped)


def read_documents(
    sources: Sequence[str | Path], *, suffixes: Sequence[str] = (), column: str | None = None
) -> tuple[list[Document], tuple[tuple[str, str], ...]]:
    """Every document of `sources`, as `read_corpus` finds them, without splitting; and what was passed over."""
    loose, given, skipped = _gather(sources, suffixes, column)
    return loose + [document for documents in given.values() for document in documents], tuple(skipped)


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
    skipped: Skipped = []
    for file in _files(root, [".py"], [], left_out):
        _take_file(file, file.relative_to(root).as_posix(), None, documents, skipped)
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


def _corpus(parts: dict[str, list[Document]], skipped: Skipped) -> Corpus:
    return Corpus(tuple(parts["train"]), tuple(parts["validation"]), tuple(parts["test"]), tuple(skipped))


def _gather(
    sources: Sequence[str | Path], suffixes: Sequence[str], column: str | None
) -> tuple[list[Document], dict[str, list[Document]], Skipped]:
    """Documents without a split, documents that came with one, and what was passed over."""
    given: dict[str, list[Document]] = {split: [] for split in SPLITS}
    loose: list[Document] = []
    skipped: Skipped = []
    tables = False
    for source in map(str, sources):
        path = Path(source)
        if _is_kind(path, Path.is_file):
            tables = tables or is_table(path)
            _take_file(path, path.name, column, loose, skipped)
        elif _is_kind(path, Path.is_dir) and not is_saved(path):
            if is_run(path):
                raise CorpusError(f"{path} is a run of this program, not text; name the folder of the text")
            for file in _files(path, suffixes, skipped):
                tables = tables or is_table(file)
                _take_found(file, file.relative_to(path).as_posix(), column, loose, skipped)
        else:
            tables = True
            without, splits = data_set(source, column, skipped)
            loose.extend(without)
            for split, documents in splits.items():
                given[split].extend(documents)
    if not loose and not any(given.values()):
        raise CorpusError(_nothing_left(sources, skipped))
    if column is not None and not tables:
        raise ConfigError("--column is for data sets, .jsonl and .parquet, and there are none; leave it out")
    return loose, given, skipped


def _is_kind(path: Path, kind: Callable[[Path], bool]) -> bool:
    try:
        return kind(path)
    except (OSError, ValueError) as error:  # a name that is too long or that no file can have
        raise CorpusError(f"{str(path)[:80]!r} cannot be a file or folder ({error})") from error


def _distinct(documents: list[Document], skipped: Skipped) -> list[Document]:
    """The first of each group of equal documents, so that none is trained on and tested with."""
    first: dict[str, Document] = {}
    for document in documents:
        kept = first.setdefault(document.digest, document)
        if kept is not document:
            skipped.append((document.name, f"same bytes as {kept.name}"))
    return list(first.values())


def _apart(
    loose: list[Document], given: dict[str, list[Document]], skipped: Skipped
) -> tuple[list[Document], dict[str, list[Document]]]:
    """Without documents that a split which is held out more strictly has too: test, then validation, then the rest."""
    seen: dict[str, str] = {}
    kept: dict[str, list[Document]] = {}
    for split in ("test", "validation", "train", ""):
        kept[split] = []
        for document in given[split] if split else loose:
            if document.digest in seen:
                skipped.append((document.name, f"same bytes as {seen[document.digest]}"))
            else:
                kept[split].append(document)
        seen |= {document.digest: document.name for document in kept[split]}
    return kept.pop(""), kept


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


def _files(root: Path, suffixes: Sequence[str], skipped: Skipped, left_out: Set[str] = frozenset()) -> Iterator[Path]:
    """The files below `root` in a fixed order.

    Passed over without a word are hidden ones and folders of the names `left_out`; with a word links to folders, which
    may lead in circles, folders that cannot be read, and folders of runs.
    """

    def told(path: Path, reason: str) -> None:
        skipped.append((path.relative_to(root).as_posix(), reason))

    def unreadable(error: OSError) -> None:
        told(Path(error.filename), f"{error.strerror or 'unreadable'} (a folder)")

    for folder, folders, names in os.walk(root, onerror=unreadable):
        inner = sorted(f for f in folders if not f.startswith(".") and f not in {"__pycache__"} | left_out)
        folders.clear()
        for path in (Path(folder, name) for name in inner):
            if path.is_symlink():
                told(path, "a link to a folder; give the folder itself as a source")
            elif is_run(path):
                told(path, "a run of this program")
            else:
                folders.append(path.name)
        for name in sorted(names):
            if not name.startswith(".") and (not suffixes or name.endswith(tuple(suffixes))):
                yield Path(folder, name)


def _take_found(path: Path, name: str, column: str | None, into: list[Document], skipped: Skipped) -> None:
    """As `_take_file`, but a table in a folder whose text is not found is passed over with a word."""
    try:
        _take_file(path, name, column, into, skipped)
    except (ConfigError, CorpusError) as error:
        if not is_table(path):
            raise
        skipped.append((name, str(error).removeprefix(f"{name}: ")))


def _take_file(path: Path, name: str, column: str | None, into: list[Document], skipped: Skipped) -> None:
    try:
        if path.exists() and not path.is_file():
            skipped.append((name, "no regular file"))  # reading a pipe would wait for ever
            return
        if is_table(path):
            into.extend(read_table(path, name, column, skipped))
            return
        load = partial(gzip_bytes, path) if path.suffix.lower() == ".gz" else path.read_bytes
        data = load()
    except (OSError, EOFError, zlib.error) as error:
        skipped.append((name, getattr(error, "strerror", None) or str(error) or "unreadable"))
        return
    reason = why_not_text(data)
    if reason is None:
        into.append(Document.of(name, data, load))
    else:
        skipped.append((name, reason))


def gzip_bytes(path: Path) -> bytes:
    """What a .gz file holds."""
    return gzip.decompress(path.read_bytes())


def _shuffled(documents: Iterable[Document], seed: int) -> list[Document]:
    """An order that depends on seed, names and contents only, so that it is the same on every machine."""

    def key(document: Document) -> bytes:
        named = f"{seed} {document.name} {document.digest}"
        return hashlib.sha256(named.encode("utf-8", "surrogateescape")).digest()  # names are bytes that may be no UTF-8

    return sorted(documents, key=key)


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
        Document.of(f"{document.name}[:{at}]", head, lambda: document.read()[:at], document.origin),
        Document.of(f"{document.name}[{at}:]", tail, lambda: document.read()[at:], document.origin),
    )


def _nothing_left(sources: Sequence[str | Path], skipped: Skipped) -> str:
    where = ", ".join(map(str, sources)) or "(nothing)"
    if not skipped:
        return f"found no text in {where}; give text files or folders that hold some"
    shown = "; ".join(f"{name}: {reason}" for name, reason in skipped[:5])
    more = f"; and {len(skipped) - 5} more" if len(skipped) > 5 else ""
    return f"found no text in {where}; skipped {len(skipped)} files ({shown}{more})"
