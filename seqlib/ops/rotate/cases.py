"""Input sets of rotate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from seqlib.ops.case import Case

__all__ = ["CASES"]


def _build(
    *shape: int, angles: int, heads_kv: int, per_head: bool = False, **options: Any
) -> Callable[[torch.Generator], dict[str, Any]]:
    """`shape` of q. Positions differ from row to row, as in packed batches."""

    def build(g: torch.Generator) -> dict[str, Any]:
        def draw(*s: int) -> torch.Tensor:
            return torch.randn(*s, generator=g, dtype=torch.float64)

        *lead, nheads, headdim = shape
        return {
            "q": draw(*shape),
            "k": draw(*lead, heads_kv, headdim),
            "theta": torch.rand(*([nheads] if per_head else []), angles, generator=g, dtype=torch.float64),
            "positions": torch.randint(0, 40, lead, generator=g),
        } | options

    return build


_KEEP = frozenset({"theta"})
CASES = (
    Case("halves", _build(2, 9, 4, 8, angles=4, heads_kv=2), _KEEP),
    Case("neighbours", _build(2, 9, 2, 12, angles=6, heads_kv=2, pairs="neighbours"), _KEEP),
    Case("part", _build(1, 21, 3, 10, angles=3, heads_kv=1), _KEEP),
    Case("part_neighbours", _build(3, 5, 2, 7, angles=2, heads_kv=4, pairs="neighbours"), _KEEP),
    Case("doubled", _build(2, 7, 3, 5, angles=5, heads_kv=3, per_head=True, pairs="doubled"), _KEEP),
    Case("doubled_alike", _build(2, 7, 3, 16, angles=16, heads_kv=2, pairs="doubled"), _KEEP),
    Case("halves_per_head", _build(2, 33, 2, 6, angles=3, heads_kv=2, per_head=True), _KEEP),
    Case("one_token", _build(3, 4, 8, angles=4, heads_kv=2), _KEEP),
    Case("same_in_all_rows", _build(3, 6, 2, 8, angles=4, heads_kv=2, positions=torch.arange(6)[None]), _KEEP),
    Case(
        "rotary_1x2048x8x64",
        _build(1, 2048, 8, 64, angles=32, heads_kv=8),
        _KEEP,
        bench=True,
        flops=2048 * 16 * 32 * 6.0,
        nbytes=2048 * 16 * 64 * 8.0,
    ),
)
