"""Input sets of mamba2_step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from seqlib.ops.case import Case

__all__ = ["CASES"]

_WIDE = frozenset({"dt_bias", "A_log", "D", "state"})


def _build(
    batch: int,
    d_model: int,
    nheads: int,
    d_state: int,
    headdim: int,
    *,
    groups: int = 1,
    d_conv: int = 4,
    bias: bool = False,
    norm: bool = False,
    gate_norm: bool = True,
    norm_before_gate: bool = False,
    per_channel: bool = False,
    limits: tuple[float, float] = (0.0, math.inf),
) -> Callable[[torch.Generator], dict[str, Any]]:
    def build(g: torch.Generator) -> dict[str, Any]:
        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        def weight(d_out: int, d_in: int) -> torch.Tensor:
            return draw(d_out, d_in) / d_in**0.5

        inner = nheads * headdim
        channels = inner + 2 * groups * d_state
        return {
            "x": draw(batch, d_model),
            "norm": draw(d_model) if norm else None,
            "norm_eps": 1e-5,
            "in_proj": weight(inner + channels + nheads, d_model),
            "in_bias": draw(inner + channels + nheads) if bias else None,
            "conv": weight(channels, d_conv),
            "conv_bias": None if bias else draw(channels) / 4,
            "dt_bias": draw(nheads),
            "A_log": draw(nheads),
            "D": draw(nheads, headdim if per_channel else 1),
            "dt_min": limits[0],
            "dt_max": limits[1],
            "gate_norm": draw(inner) if gate_norm else None,
            "eps": 1e-5,
            "norm_before_gate": norm_before_gate,
            "out_proj": weight(d_model, inner),
            "out_bias": draw(d_model) if bias else None,
            "conv_state": draw(batch, d_conv - 1, channels),
            "state": draw(batch, nheads, d_state, headdim),
        }

    return build


CASES = (
    Case("one_row", _build(1, 24, 4, 16, 8), _WIDE),
    Case("residual_branch", _build(2, 24, 4, 16, 8, norm=True), _WIDE),
    Case("groups_and_biases", _build(3, 20, 6, 37, 12, groups=3, bias=True, norm=True), _WIDE),
    Case("norm_before_gate", _build(1, 16, 4, 9, 4, groups=2, norm_before_gate=True), _WIDE),
    Case("no_norm", _build(2, 16, 2, 8, 16, gate_norm=False, per_channel=True), _WIDE),
    Case("limits", _build(2, 16, 2, 8, 16, limits=(0.4, 0.9), d_conv=3), _WIDE),
    Case("odd_heads", _build(2, 10, 3, 5, 7, d_conv=6), _WIDE),
    Case("many_rows", _build(9, 16, 2, 8, 8), _WIDE),
    Case(
        "mamba2_step_1x768",
        _build(1, 768, 24, 128, 64, norm=True),
        _WIDE,
        bench=True,
        flops=2.0 * (768 * 3352 + 1536 * 768 + 3 * 24 * 128 * 64),
        nbytes=4.0 * (768 * 3352 + 1536 * 768 + 2 * 24 * 128 * 64),
    ),
)
