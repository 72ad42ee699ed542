"""Input sets of gelu_glu."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from seqlib.ops.case import Case

__all__ = ["CASES"]


def _build(*shape: int, d_out: int, bias: bool = True) -> Callable[[torch.Generator], dict[str, Any]]:
    def build(g: torch.Generator) -> dict[str, Any]:
        def draw(*s: int) -> torch.Tensor:
            return torch.randn(*s, generator=g, dtype=torch.float64)

        d = shape[-1]
        return {
            "x": draw(*shape),
            "weight": draw(2 * d_out, d) / d**0.5,
            "bias": draw(2 * d_out) if bias else None,
        }

    return build


CASES = (
    Case("few_rows", _build(3, 40, d_out=8)),
    Case("blocks_of_rows", _build(2, 97, 64, d_out=64)),
    Case("odd_widths", _build(65, 33, d_out=35)),
    Case("no_bias", _build(64, 32, d_out=3, bias=False)),
    Case("several_parts", _build(2, 2049, 34, d_out=17)),
    Case(
        "glu_16384x256",
        _build(8, 2048, 256, d_out=256),
        bench=True,
        flops=4.0 * 16384 * 256 * 256,
        nbytes=4.0 * (2 * 16384 * 256 + 512 * 256),
    ),
)
