"""ListOps: nested lists of digits under MIN, MAX, MED and SM, whose value is the label."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqlib.errors import ConfigError, CorpusError

from .store import Examples

__all__ = [
    "SYMBOLS",
    "Shape",
    "decode",
    "encode",
    "evaluate",
    "first_operator",
    "generate",
    "read_tsv",
    "stored",
    "write_tsv",
]

SYMBOLS = ("<pad>", *"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]")
"""Tokens by id."""
_IDS = {symbol: i for i, symbol in enumerate(SYMBOLS)}
_FIRST_OPERATOR, _CLOSE = _IDS["[MIN"], _IDS["]"]
_LONGEST = 100_000  # symbols of a generated list
_OPERATOR_P = 0.25  # the published generator names it the probability of a value; it is that of an operator


@dataclass(frozen=True)
class Shape:
    """The distribution of lists. The defaults are those of Long Range Arena."""

    max_depth: int = 10
    """Digits may stand at this depth, operators only above it."""
    max_args: int = 10
    min_length: int = 500
    """Lengths lie strictly between min_length and max_length, brackets counted and parentheses not."""
    max_length: int = 2000

    def __post_init__(self) -> None:
        if self.max_depth < 2 or self.max_args < 2:
            raise ConfigError(
                f"listops needs max_depth >= 2 and max_args >= 2, got {self.max_depth} and {self.max_args}"
            )
        if self.max_length > _LONGEST:
            raise ConfigError(f"listops: max_length is at most {_LONGEST:,}, got {self.max_length:,}")
        if not self.max_length - 1 >= 3 or not self.min_length + 1 < self.max_length:
            raise ConfigError(f"listops: no length lies between {self.min_length} and {self.max_length}")


def generate(n: int, shape: Shape | None = None, *, seed: int = 0) -> list[bytes]:
    """n different lists as token ids, in order of drawing.

    A node at depth < max_depth is an operator with probability 0.25 and a digit otherwise; an operator has 2 ..
    max_args arguments, drawn left to right before the operator itself. Lists of a length outside the shape and repeated
    lists are dropped.

    Raises:
        ConfigError: the shape has too few different lists, or almost no list fits it.

    Source: google-research/long-range-arena, lra_benchmarks/data/listops.py, whose output follows Python's hash order
    and cannot be repeated; this one can.
    """
    shape = shape or Shape()
    draw = random.Random(f"listops {seed}").random
    found: dict[bytes, None] = {}
    since = 0  # draws since the last new list
    while len(found) < n:
        tokens = _draw(draw, shape)
        before = len(found)
        if shape.min_length < len(tokens) < shape.max_length:
            found[bytes(tokens)] = None
        since = since + 1 if len(found) == before else 0
        if since > 100_000:
            raise ConfigError(
                f"listops: 100,000 draws gave no list beyond the first {before} for {shape}; widen its lengths"
            )
    return list(found)


def _draw(draw: Any, shape: Shape) -> list[int]:
    """A list; stops early once it is too long anyway."""
    tokens: list[int] = []
    opened: list[list[int]] = []  # where each operator stands that is not closed, and the arguments it still lacks
    while True:
        if len(opened) + 1 < shape.max_depth and draw() <= _OPERATOR_P:
            opened.append([len(tokens), 2 + int(draw() * (shape.max_args - 1))])
            tokens.append(0)
            continue
        tokens.append(1 + int(draw() * 10))
        while opened:
            if len(tokens) >= shape.max_length:
                return tokens
            opened[-1][1] -= 1
            if opened[-1][1]:
                break
            tokens[opened.pop()[0]] = _FIRST_OPERATOR + int(draw() * 4)
            tokens.append(_CLOSE)
        else:
            return tokens


def evaluate(ids: Sequence[int] | NDArray[Any], depth: int | None = None, guesses: Sequence[int] = (0, 9, 4, 1)) -> int:
    """The value of a list.

    MED is the median truncated towards zero, SM the sum modulo 10.

    Args:
        depth: lists nested deeper than this are ignored, as a shortcut would; None: all count.
        guesses: value of a MIN, MAX, MED or SM that then has no argument left.
    """
    stack: list[tuple[int, list[int]]] = []
    for token in ids if isinstance(ids, (bytes, list)) else ids.tolist():  # type: ignore[union-attr]
        if token < _FIRST_OPERATOR:
            if not stack:
                return token - 1
            stack[-1][1].append(token - 1)
        elif token != _CLOSE:
            stack.append((token - _FIRST_OPERATOR, []))
        else:
            if not stack:
                raise CorpusError("a list is closed before it is opened")
            operator, values = stack.pop()
            value = _apply(operator, values) if values else guesses[operator]
            if not stack:
                return value
            if depth is None or len(stack) < depth:
                stack[-1][1].append(value)
    raise CorpusError(f"a list is not closed: {' '.join(SYMBOLS[i] for i in list(ids)[:12])} ...")


def _apply(operator: int, values: list[int]) -> int:
    if operator == 0:
        return min(values)
    if operator == 1:
        return max(values)
    if operator == 3:
        return sum(values) % 10
    ordered, middle = sorted(values), len(values) // 2
    return ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) // 2


def first_operator(ids: Sequence[int] | NDArray[Any]) -> int:
    """0 .. 3 for MIN, MAX, MED, SM at the root; 4 for a bare digit."""
    return int(ids[0]) - _FIRST_OPERATOR if ids[0] >= _FIRST_OPERATOR else 4


def encode(text: str) -> bytes:
    """Ids of a list in either text form; parentheses are dropped.

    >>> decode(encode("( ( ( [MAX 2 ) 9 ) ] )"))
    '[MAX 2 9 ]'
    """
    return bytes([_IDS[word] for word in text.replace("(", " ").replace(")", " ").split()])


def decode(ids: Sequence[int]) -> str:
    """The list in bracket form."""
    return " ".join(SYMBOLS[i] for i in ids)


def stored(ids: Sequence[int]) -> str:
    """The list in the form of the released files, every argument wrapped from the left in parentheses.

    >>> stored(encode("[SM 2 [MAX 1 9 ] 0 ]"))
    '( ( ( ( [SM 2 ) ( ( ( [MAX 1 ) 9 ) ] ) ) 0 ) ] )'
    """
    stack: list[str] = []
    for i in ids:
        if _FIRST_OPERATOR <= i < _CLOSE:
            stack.append(SYMBOLS[i])
            continue
        node = SYMBOLS[i]
        if i == _CLOSE:
            node = f"( {stack.pop()} ] )"
        if not stack:
            return node
        stack[-1] = f"( {stack[-1]} {node} )"
    raise CorpusError(f"a list is not closed: {decode(list(ids)[:12])} ...")


def write_tsv(path: Path, lists: Iterable[Sequence[int]], labels: Iterable[int]) -> None:
    """The released file format: header, tab, CRLF."""
    with path.open("w", newline="") as file:
        file.write("Source\tTarget\r\n")
        file.writelines(f"{stored(ids)}\t{label}\r\n" for ids, label in zip(lists, labels))


def read_tsv(path: Path, *, check: int = 200) -> Examples:
    """Lists and labels of a released file.

    Every list must be closed; the first `check` lists are evaluated and compared with their labels.

    Raises:
        CorpusError: naming file and line.
    """
    rows: list[NDArray[Any]] = []
    labels: list[int] = []
    for number, (source, target) in _rows(path):
        try:
            ids = encode(source)
        except KeyError as error:
            raise CorpusError(
                f"{path}:{number}: {error.args[0]!r} is no symbol of ListOps; known: {' '.join(SYMBOLS[1:])}"
            ) from error
        opened = sum(map(ids.count, range(_FIRST_OPERATOR, _CLOSE)))
        if opened != ids.count(_CLOSE) or not ids:
            raise CorpusError(
                f"{path}:{number}: {opened} lists are opened and {ids.count(_CLOSE)} closed; the closing brackets "
                "were lost by an old tokenizer or the line is cut off: use the released file"
            )
        if target not in "0123456789" or len(target) != 1:
            raise CorpusError(f"{path}:{number}: the label must be a digit, got {target!r}")
        if len(rows) < check and (value := _value(path, number, ids)) != int(target):
            raise CorpusError(f"{path}:{number}: the list evaluates to {value}, its label is {target}")
        rows.append(np.frombuffer(ids, np.uint8))
        labels.append(int(target))
    return Examples.pack(rows, labels, vocab_size=len(SYMBOLS))


def _value(path: Path, number: int, ids: bytes) -> int:
    try:
        return evaluate(ids)
    except CorpusError as error:
        raise CorpusError(f"{path}:{number}: {error}") from error


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    with path.open(newline="", encoding="utf-8", errors="replace") as file:  # what is no symbol is told with its line
        header = next(file, "").rstrip("\r\n")
        if header.split("\t") != ["Source", "Target"]:
            raise CorpusError(f"{path}:1: the header must be Source<TAB>Target, got {header[:80]!r}")
        for number, line in enumerate(file, 2):
            cells = line.rstrip("\r\n").split("\t")
            if len(cells) != 2 or not line.endswith("\n"):
                what = f"{len(cells)} columns" if line.endswith("\n") else "no line end: the file is cut off"
                raise CorpusError(f"{path}:{number}: expected Source<TAB>Target, found {what}")
            yield number, cells
