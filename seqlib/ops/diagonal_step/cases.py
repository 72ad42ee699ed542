"""Input sets of diagonal_step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from seqlib.ops.case import Case

__all__ = ["CASES"]

_WIDE = frozenset({"B", "C", "D", "decay", "state"})


def _build(batch: int, d: int, n: int, *, real: bool = False) -> Callable[[torch.Generator], dict[str, Any]]:
    def build(g: torch.Generator) -> dict[str, Any]:
        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        size = torch.rand(d, n, generator=g, dtype=torch.float64)
        width = n if real else 2 * n
        return {
            "x": draw(batch, d),
            "decay": size if real else torch.polar(size, draw(d, n)),
            "B": draw(d, width),
            "C": draw(d, width) / width**0.5,
            "D": draw(d),
            "state": draw(batch, d, n) if real else torch.complex(draw(batch, d, n), draw(batch, d, n)),
        }

    return build


CASES = (
    Case("complex", _build(3, 37, 5), _WIDE),
    Case("real", _build(2, 21, 7, real=True), _WIDE),
    Case("scalar", _build(1, 1, 1), _WIDE),
    Case("many_rows", _build(9, 16, 4), _WIDE),
    Case(
        "diagonal_step_1x256x32",
        _build(1, 256, 32),
        _WIDE,
        bench=True,
        flops=14.0 * 256 * 32,
        nbytes=4.0 * 256 * 32 * 10,
    ),
)
