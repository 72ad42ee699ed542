"""Text in tables: data sets with named splits, and files of JSON lines or Parquet."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from seqlib.errors import ConfigError, CorpusError
from seqlib.hf.hub import check_name

from .documents import SPLITS, Document, Skipped

__all__ = ["data_set", "is_saved", "is_table", "read_table"]

_LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".json.gz")
_PARQUET = ".parquet"
# Names that data sets give to their splits, by what they begin with.
_NAMES = {"train": r"train", "validation": r"valid|val(?![a-z])|dev|eval", "test": r"test|held[-_]?out"}


def is_table(path: Path) -> bool:
    return path.name.lower().endswith((*_LINES, _PARQUET))


def read_table(path: Path, name: str, column: str | None, skipped: Skipped) -> list[Document]:
    """The texts of a file of JSON lines, plain or packed, or of Parquet, a document per row.

    Raises:
        CorpusError: the file is damaged, or it is not clear which column holds the text.
    """
    if path.name.lower().endswith(_PARQUET):
        import datasets
        from datasets.exceptions import DatasetsError

        datasets.disable_progress_bars()  # one for each file of a folder
        try:
            table = datasets.Dataset.from_parquet(str(path))
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            raise CorpusError(f"{name} cannot be read as Parquet ({_first_line(error)})") from error
        return list(_rows(name, table, column, skipped))
    return list(_lines(path, name, column, skipped))


def _lines(path: Path, name: str, column: str | None, skipped: Skipped) -> Iterator[Document]:
    packed = path.name.lower().endswith(".gz")
    at = 0
    try:
        with gzip.open(path) if packed else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                begin, at = at, at + len(line)
                if not line.strip():
                    continue
                row = f"{name}:{number}"
                values = _object(line)
                if values is None:
                    skipped.append((row, "no JSON object"))
                    continue
                column = column or _text_column(name, [key for key, text in values.items() if isinstance(text, str)])
                text = values.get(column)
                data = _encoded(text) if isinstance(text, str) else b""
                if data:
                    # Packed files cannot be read from the middle: their texts stay in memory.
                    yield Document.of(row, data, None if packed else _line_loader(path, begin, at, column))
                else:
                    skipped.append((row, "empty" if text == "" else f"no text in {column!r}"))
    except (OSError, EOFError, zlib.error) as error:
        raise CorpusError(f"{name} cannot be read ({_first_line(error)})") from error


def _line_loader(path: Path, begin: int, end: int, column: str) -> Callable[[], bytes]:
    def load() -> bytes:
        with path.open("rb") as file:
            file.seek(begin)
            text = (_object(file.read(end - begin)) or {}).get(column)
        return _encoded(text) if isinstance(text, str) else b""

    return load


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", errors="replace")  # halves of characters, which JSON can hold


def _text_column(name: str, strings: list[str]) -> str:
    if "text" in strings:
        return "text"
    if len(strings) == 1:
        return strings[0]
    raise ConfigError(f"{name}: name the text column with --column, one of: {', '.join(strings) or '(no strings)'}")


def is_saved(path: Path) -> bool:
    """Whether a folder was written by `save_to_disk` of the library datasets."""
    return any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json"))


def data_set(source: str, column: str | None, skipped: Skipped) -> tuple[list[Document], dict[str, list[Document]]]:
    """Documents of a data set: those without a split, and those of each of our splits.

    Splits count by their names (train; valid, validation, val, dev, eval; test, held_out); others are left out and
    said to be.

    Raises:
        CorpusError: there is no such data set, or it has no text.
    """
    import datasets

    if Path(source).is_dir():
        try:
            loaded: Any = datasets.load_from_disk(source)
        except (OSError, ValueError, RuntimeError, LookupError, TypeError) as error:
            raise CorpusError(f"{source} is a damaged data set ({_first_line(error)}); save it again") from error
    else:
        loaded = _from_hub(source)
    if not isinstance(loaded, dict):
        return list(_rows(source, loaded, column, skipped)), {}
    given: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for name, table in loaded.items():
        split = next((ours for ours, begins in _NAMES.items() if re.match(begins, name.lower())), None)
        if split is None:
            skipped.append((f"{source}/{name}", "a split that is none of train, validation and test"))
        else:
            given[split].extend(_rows(f"{source}/{name}", table, column, skipped))
    return [], given


def _from_hub(source: str) -> Any:
    import datasets
    from datasets.exceptions import DatasetsError

    name, _, config = source.partition(":")
    remedy = "give a text file, a folder or the name of a data set"
    check_name(name, "text", remedy, kind="dataset")
    try:
        return datasets.load_dataset(name, config or None)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise CorpusError(f"data set {source!r} could not be loaded ({_first_line(error)}); {remedy}") from error


def _rows(name: str, table: Any, column: str | None, skipped: Skipped) -> Iterator[Document]:
    strings = [c for c, kind in table.features.items() if getattr(kind, "dtype", "") in ("string", "large_string")]
    column = column or _text_column(name, strings)
    if column not in strings:
        raise CorpusError(f"{name}: name the text column with --column, one of: {', '.join(strings) or '(no strings)'}")

    def load(row: int) -> Callable[[], bytes]:
        return lambda: table[row][column].encode()  # noqa: PLW0108 - a row is read when it is wanted, not now

    for row, text in enumerate(table[column]):
        if text:
            yield Document.of(f"{name}/{row}", text.encode(), load(row))
        else:
            skipped.append((f"{name}/{row}", "empty"))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
