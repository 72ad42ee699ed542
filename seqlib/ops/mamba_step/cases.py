"""Input sets of mamba_step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from seqlib.ops.case import Case

__all__ = ["CASES"]

_WIDE = frozenset({"dt_bias", "A", "D", "state"})


def _build(
    batch: int, d_model: int, d_inner: int, d_state: int, *, d_conv: int = 4, rank: int = 2, bias: bool = False
) -> Callable[[torch.Generator], dict[str, Any]]:
    def build(g: torch.Generator) -> dict[str, Any]:
        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        def weight(d_out: int, d_in: int) -> torch.Tensor:
            return draw(d_out, d_in) / d_in**0.5

        return {
            "x": draw(batch, d_model),
            "in_proj": weight(2 * d_inner, d_model),
            "in_bias": draw(2 * d_inner) if bias else None,
            "conv": weight(d_inner, d_conv),
            "conv_bias": None if bias else draw(d_inner) / 4,
            "x_proj": weight(rank + 2 * d_state, d_inner),
            "dt_proj": weight(d_inner, rank),
            "dt_bias": draw(d_inner),
            "A": -torch.rand(d_inner, d_state, generator=g, dtype=torch.float64) * 8,
            "D": draw(d_inner),
            "out_proj": weight(d_model, d_inner),
            "out_bias": draw(d_model) if bias else None,
            "conv_state": draw(batch, d_conv - 1, d_inner),
            "state": draw(batch, d_inner, d_state),
        }

    return build


CASES = (
    Case("one_row", _build(1, 24, 48, 16), _WIDE),
    Case("rows_and_biases", _build(3, 20, 37, 5, d_conv=3, rank=4, bias=True), _WIDE),
    Case("eight_rows", _build(8, 16, 32, 8, d_conv=2), _WIDE),
    Case("many_rows", _build(9, 16, 32, 8), _WIDE),
    Case("scalars", _build(1, 1, 1, 1, d_conv=1, rank=1), _WIDE),
    Case(
        "mamba_step_1x768",
        _build(1, 768, 1536, 16, rank=48),
        _WIDE,
        bench=True,
        flops=2.0 * (768 * 3072 + 1536 * 80 + 48 * 1536 + 1536 * 768),
        nbytes=4.0 * (768 * 3072 + 1536 * 80 + 48 * 1536 + 1536 * 768 + 2 * 1536 * 16),
    ),
)
