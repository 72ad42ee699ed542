"""A byte n-gram model: what counting alone achieves on a text, the line that a trained model has to pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from seqlib.errors import ConfigError, CorpusError

__all__ = ["NGram"]

MAX_ORDER = 7  # seven symbols of 9 bits fit into one int64
_START = 256  # the symbol that stands before a document, so that its first byte has a context too
_DISCOUNTS = (0.02, 0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # never 0, which would make unseen bytes impossible
_STRENGTHS = (0.0, 0.1, 0.3, 1.0, 2.0, 4.0, 8.0)

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class _Table:
    """Counts of the n-grams of one order, sorted by code, and the totals of their contexts."""

    grams: Ints
    counts: Ints
    contexts: Ints
    totals: Ints
    kinds: Ints
    """How many different bytes followed each context."""

    @classmethod
    def of(cls, grams: Ints, counts: Ints) -> _Table:
        contexts, first = np.unique(grams >> 9, return_index=True)
        return cls(grams, counts, contexts, np.add.reduceat(counts, first), np.diff(np.append(first, len(grams))))

    def look_up(self, codes: Ints) -> tuple[Floats, Floats, Floats]:
        """(count of the n-gram, total of its context, kinds after its context) of each code; zeros if unseen."""
        at = np.searchsorted(self.grams, codes).clip(0, len(self.grams) - 1)
        context_at = np.searchsorted(self.contexts, codes >> 9).clip(0, len(self.contexts) - 1)
        known = self.contexts[context_at] == codes >> 9
        return (
            np.where(self.grams[at] == codes, self.counts[at], 0).astype(np.float64),
            np.where(known, self.totals[context_at], 0).astype(np.float64),
            np.where(known, self.kinds[context_at], 0).astype(np.float64),
        )


@dataclass
class NGram:
    """Interpolated Kneser-Ney n-grams over bytes with a discount and a strength per order.

        p_k(b | s) = (max(c(s b) - d_k, 0) + (d_k kinds(s) + a_k) p_{k-1}(b | s')) / (total(s) + a_k),  p_0 = 1 / 256

    s' is the context s without its oldest symbol; a context that was never seen passes p_{k-1} on. c are counts at the
    highest order and, below it, the number of different symbols seen before the n-gram. Every byte of a document is
    scored, its first one after `order - 1` document-start symbols.

    Args:
        order: bytes per n-gram, the predicted one included, 1 to 7.

    Source: Chen and Goodman 1999, section 3 (interpolated Kneser-Ney); Teh 2006, eq. 5 (the strength a_k).
    """

    order: int
    discounts: list[float] = field(init=False)
    strengths: list[float] = field(init=False)
    _tables: list[_Table] = field(init=False, default_factory=list, repr=False)

    def __post_init__(self) -> None:
        if not 1 <= self.order <= MAX_ORDER:
            raise ConfigError(f"n-gram order must be 1 to {MAX_ORDER}, got {self.order}")
        self.discounts = [0.7] * self.order
        self.strengths = [1.0] * self.order

    def fit(self, documents: Sequence[bytes]) -> NGram:
        """Count the n-grams of `documents`."""
        codes = self._codes(documents)
        grams, counts = np.unique(codes, return_counts=True)
        tables = [_Table.of(grams, counts)]
        for order in range(self.order - 1, 0, -1):
            # Each distinct longer n-gram is one symbol seen before its ending.
            grams, counts = np.unique(grams & _mask(order), return_counts=True)
            tables.append(_Table.of(grams, counts))
        self._tables = tables[::-1]
        return self

    def tune(self, documents: Sequence[bytes]) -> NGram:
        """Choose discounts and strengths on `documents` (never those that are scored afterwards), one at a time."""
        found = self._look_up(documents)
        best = self._mean_bits(found)
        for _ in range(2):
            for k in range(self.order):
                for values, grid in ((self.discounts, _DISCOUNTS), (self.strengths, _STRENGTHS)):
                    for value in grid:
                        before, values[k] = values[k], value
                        bits = self._mean_bits(found)
                        if bits < best:
                            best = bits
                        else:
                            values[k] = before
        return self

    def bits_per_byte(self, documents: Sequence[bytes]) -> float:
        """Mean of -log2 p over every byte of `documents`."""
        return self._mean_bits(self._look_up(documents))

    def _codes(self, documents: Sequence[bytes]) -> Ints:
        """The last `order` symbols at each byte, 9 bits each, the newest lowest."""
        parts = []
        for document in documents:
            data = np.frombuffer(document, np.uint8).astype(np.int64)
            symbols = np.concatenate([np.full(self.order - 1, _START), data])
            code = np.zeros(len(data), np.int64)
            for age in range(self.order):
                begin = self.order - 1 - age
                code |= symbols[begin : begin + len(data)] << (9 * age)
            parts.append(code)
        codes = np.concatenate(parts) if parts else np.zeros(0, np.int64)
        if not len(codes):
            raise CorpusError("the n-gram model was given no bytes; give it at least one document that is not empty")
        return codes

    def _look_up(self, documents: Sequence[bytes]) -> list[tuple[Floats, Floats, Floats]]:
        codes = self._codes(documents)
        return [table.look_up(codes & _mask(k)) for k, table in enumerate(self._tables, 1)]

    def _mean_bits(self, found: list[tuple[Floats, Floats, Floats]]) -> float:
        p = np.full(len(found[0][0]), 1 / 256)
        for (count, total, kinds), discount, strength in zip(found, self.discounts, self.strengths):
            mixed = np.maximum(count - discount, 0) + (discount * kinds + strength) * p
            p = np.where(total > 0, mixed / np.where(total > 0, total + strength, 1), p)
        return float(-np.log2(p).mean())


def _mask(order: int) -> int:
    return (1 << (9 * order)) - 1
