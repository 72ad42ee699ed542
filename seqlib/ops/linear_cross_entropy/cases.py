"""Input sets of linear_cross_entropy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from seqlib.ops.case import Case

__all__ = ["CASES"]


def _build(rows: int, d: int, words: int, ignored: int = 0, **options: Any) -> Callable[[torch.Generator], dict]:
    def build(g: torch.Generator) -> dict[str, Any]:
        def draw(*s: int) -> torch.Tensor:
            return torch.randn(*s, generator=g, dtype=torch.float64)

        targets = torch.randint(words, (rows,), generator=g)
        targets[:ignored] = options.get("ignore_index", -100)
        return {"x": draw(rows, d), "weight": draw(words, d) / d**0.5, "targets": targets} | options

    return build


CASES = (
    Case("plain", _build(7, 16, 33)),
    Case("one_row", _build(1, 5, 2)),
    Case("ignored", _build(9, 24, 70, ignored=4, ignore_index=-1)),
    Case("divided", _build(5, 16, 20, ignored=1, divisor=torch.tensor(11))),
    Case("scaled", _build(6, 16, 50, scale=0.3)),
    Case("capped", _build(6, 16, 50, scale=2.0, softcap=1.5)),
    Case(
        "head_2048x768x32000",
        _build(2048, 768, 32000),
        bench=True,
        flops=2.0 * 2048 * 768 * 32000,
        nbytes=4.0 * (2048 * 768 + 768 * 32000),
    ),
)
