"""One text, known by its contents and read when it is asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

from seqlib.errors import CorpusError

__all__ = ["SPLITS", "Document", "Skipped"]

SPLITS = ("train", "validation", "test")
Skipped = list[tuple[str, str]]
"""Names of what was passed over, and why."""


@dataclass(frozen=True)
class Document:
    """One text. Its bytes are read when asked for, so a corpus larger than memory is a list of small objects."""

    name: str
    digest: str
    nbytes: int
    load: Callable[[], bytes] = field(repr=False, compare=False)
    whole: str = ""
    """Digest of the text that this one is a part of; empty: it is a whole one."""

    @classmethod
    def of(cls, name: str, data: bytes, load: Callable[[], bytes] | None = None, whole: str = "") -> Document:
        return cls(name, hashlib.sha256(data).hexdigest(), len(data), load or (lambda: data), whole)

    @property
    def origin(self) -> str:
        """Digest of the whole text."""
        return self.whole or self.digest

    def read(self) -> bytes:
        """The bytes; an error if they are not those that were seen first."""
        data = self.load()
        if len(data) != self.nbytes or hashlib.sha256(data).hexdigest() != self.digest:
            raise CorpusError(f"{self.name} changed while it was being used; start again")
        return data
