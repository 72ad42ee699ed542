"""Input sets of linear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from seqlib.ops.case import Case

__all__ = ["CASES"]


def _build(*shape: int, d_out: int, bias: bool = False) -> Callable[[torch.Generator], dict[str, Any]]:
    def build(g: torch.Generator) -> dict[str, Any]:
        def draw(*s: int) -> torch.Tensor:
            return torch.randn(*s, generator=g, dtype=torch.float64)

        d = shape[-1]
        return {"x": draw(*shape), "weight": draw(d_out, d) / d**0.5, "bias": draw(d_out) if bias else None}

    return build


CASES = (
    Case("one_row", _build(1, 48, d_out=7)),
    Case("row_of_a_sequence", _build(1, 1, 100, d_out=33, bias=True)),
    Case("few_rows", _build(3, 65, d_out=18, bias=True)),
    Case("eight_rows", _build(8, 128, d_out=5)),
    Case("many_rows", _build(2, 9, 31, d_out=12, bias=True)),
    Case("scalar", _build(1, 1, d_out=1)),
    Case(
        "linear_1x768x3072",
        _build(1, 768, d_out=3072),
        bench=True,
        flops=2.0 * 768 * 3072,
        nbytes=4.0 * (768 * 3072 + 768 + 3072),
    ),
)
