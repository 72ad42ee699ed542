"""Input sets of matrix_step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from seqlib.ops.case import Case

__all__ = ["CASES"]

_WIDE = frozenset({"beta", "log_decay", "norm_weight", "state"})


def _build(
    batch: int,
    heads: int,
    nheads: int,
    d_state: int,
    headdim: int,
    *,
    delta: bool = False,
    decay: str = "token",
    flat: bool = True,
    unit: bool = False,
    norm: str = "rms",
    norm_weight: bool = True,
    gate: bool = True,
    activation: str = "silu",
    group_size: int = 0,
    bias: bool = False,
    d_out: int = 11,
) -> Callable[[torch.Generator], dict[str, Any]]:
    def build(g: torch.Generator) -> dict[str, Any]:
        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        def side(t: torch.Tensor) -> torch.Tensor:
            return t.flatten(1) if flat else t

        shapes = {"constant": (nheads,), "token": (batch, nheads), "channel": (batch, nheads, d_state)}
        inner, ratio = nheads * headdim, norm == "ratio"
        # A ratio divides by sums of products of q and k, which stay away from 0 where both are positive.
        q, k = (t.abs() + 0.1 if ratio else t for t in (draw(batch, heads, d_state), draw(batch, heads, d_state)))
        state = draw(batch, nheads, d_state, headdim + ratio)
        return {
            "q": side(q),
            "k": side(k / d_state**0.5),
            "v": side(draw(batch, nheads, headdim)),
            "beta": torch.rand(batch, nheads, generator=g, dtype=torch.float64) if delta else None,
            "log_decay": None if decay == "none" else -draw(*shapes[decay]).abs(),
            "state": state.abs() if ratio else state,
            "scale": d_state**-0.5,
            "unit": unit,
            "norm": norm,
            "norm_weight": draw(inner if group_size else headdim) if norm_weight and norm == "rms" else None,
            "gate": draw(batch, inner) if gate and norm == "rms" else None,
            "activation": activation,
            "group_size": group_size,
            "eps": 1e-5,
            "weight": draw(d_out, inner) / inner**0.5,
            "bias": draw(d_out) if bias else None,
        }

    return build


CASES = (
    Case("attention", _build(1, 2, 2, 8, 16), _WIDE),
    Case("constant_decay", _build(3, 2, 2, 7, 9, decay="constant", flat=False, activation="sigmoid"), _WIDE),
    Case("channel_decay", _build(2, 2, 4, 12, 6, decay="channel", bias=True), _WIDE),
    Case("no_decay_groups", _build(2, 2, 4, 8, 6, decay="none", group_size=12, activation="none"), _WIDE),
    Case("delta", _build(1, 2, 4, 16, 8, delta=True, unit=True), _WIDE),
    Case("delta_channels", _build(3, 3, 3, 9, 7, delta=True, unit=True, decay="channel", gate=False), _WIDE),
    Case("delta_no_decay", _build(2, 2, 2, 8, 8, delta=True, decay="none", norm_weight=False), _WIDE),
    Case("wide_delta", _build(1, 1, 1, 264, 8, delta=True, unit=True), _WIDE),
    Case("ratio", _build(2, 2, 2, 8, 12, decay="none", norm="ratio"), _WIDE),
    Case("sums", _build(2, 2, 2, 8, 12, decay="constant", norm="none", bias=True), _WIDE),
    Case("many_rows", _build(9, 2, 2, 8, 8), _WIDE),
    Case(
        "matrix_step_1x16x64x128",
        _build(1, 16, 16, 64, 128, delta=True, unit=True, d_out=1024),
        _WIDE,
        bench=True,
        flops=2.0 * (1024 * 2048 + 3 * 16 * 64 * 128),
        nbytes=4.0 * (1024 * 2048 + 2 * 16 * 64 * 128),
    ),
)
