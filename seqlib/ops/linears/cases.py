"""Input sets of linears."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from seqlib.ops.case import Case

__all__ = ["CASES"]


def _build(*shape: int, d_out: tuple[int, ...]) -> Callable[[torch.Generator], dict[str, Any]]:
    def build(g: torch.Generator) -> dict[str, Any]:
        def draw(*s: int) -> torch.Tensor:
            return torch.randn(*s, generator=g, dtype=torch.float64)

        d = shape[-1]
        weights = [draw(n, d) / d**0.5 for n in d_out]
        return {"x": draw(*shape), "weights": weights, "biases": [draw(n) if n % 2 else None for n in d_out]}

    return build


CASES = (
    Case("one_row", _build(1, 41, d_out=(70, 1, 33))),
    Case("row_of_a_sequence", _build(2, 1, 24, d_out=(8, 5))),
    Case("eight_rows", _build(8, 16, d_out=(3,))),
    Case("many_rows", _build(2, 9, 16, d_out=(4, 7))),
    Case(
        "linears_1x768",
        _build(1, 768, d_out=(768, 768, 768)),
        bench=True,
        flops=6.0 * 768 * 768,
        nbytes=4.0 * (3 * 768 * 768 + 4 * 768),
    ),
)
