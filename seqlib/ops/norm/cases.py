"""Input sets of rms_norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from seqlib.ops.case import Case

__all__ = ["CASES"]


def _build(*shape: int, weight: bool = True, gate: bool = False, **options: Any) -> Callable[[torch.Generator], dict]:
    def build(g: torch.Generator) -> dict[str, Any]:
        def draw(*s: int) -> torch.Tensor:
            return torch.randn(*s, generator=g, dtype=torch.float64)

        made: dict[str, Any] = {"x": draw(*shape), "weight": 1 + 0.1 * draw(shape[-1]) if weight else None}
        return made | ({"gate": draw(*shape)} if gate else {}) | options

    return build


def _bench(name: str, rows: int, d: int, *, gate: bool) -> Case:
    return Case(
        name,
        _build(1, rows, d, gate=gate, **({"norm_before_gate": False} if gate else {})),
        frozenset({"weight"}),
        bench=True,
        flops=rows * d * (10.0 if gate else 4.0),
        nbytes=rows * d * (12.0 if gate else 8.0),
    )


_KEEP = frozenset({"weight"})
CASES = (
    Case("plain", _build(2, 7, 48), _KEEP),
    Case("weightless", _build(1, 3, 33, weight=False), _KEEP),
    Case("gate_first", _build(2, 5, 70, gate=True), _KEEP),
    Case("gate_last", _build(2, 5, 64, gate=True, norm_before_gate=True), _KEEP),
    Case("grouped", _build(3, 4, 96, gate=True, group_size=24), _KEEP),
    Case("one_row", _build(1, 1, 17), _KEEP),
    _bench("rms_norm_1x2048x1536", 2048, 1536, gate=False),
    _bench("gated_rms_norm_1x2048x1536", 2048, 1536, gate=True),
)
