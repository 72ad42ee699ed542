"""Input sets of ssm_kernel_diag."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from seqlib.ops.case import Case, at_ends

__all__ = ["CASES"]


def _build(
    d: int,
    n: int,
    length: int,
    *,
    real: bool = False,
    lead: tuple[int, ...] = (),
    per_state: bool = False,
    constant_B: bool = False,
    discretization: str = "zoh",
    ends: bool = False,
) -> Callable[[torch.Generator], dict[str, Any]]:
    def build(g: torch.Generator) -> dict[str, Any]:
        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64 if real else torch.complex128)

        A = -0.5 - torch.rand(d, n, generator=g, dtype=torch.float64)
        if ends:
            A = at_ends(A)
        if not real:
            A = torch.complex(A, torch.pi * torch.arange(n).expand(d, n).double())
        dt = torch.exp(-4.6 * torch.rand(*((d, n) if per_state else (d,)), generator=g, dtype=torch.float64) - 2.3)
        return {
            "A": A,
            "B": draw(n) if constant_B else draw(d, n),
            "C": draw(*lead, d, n) / n**0.5,
            "dt": dt,
            "length": length,
            "discretization": discretization,
        }

    return build


_KEEP = frozenset({"A", "B", "C", "dt"})
CASES = (
    Case("pairs", _build(5, 8, 100), _KEEP),
    Case("one_position", _build(3, 4, 1), _KEEP),
    Case("two_positions", _build(3, 4, 2), _KEEP),
    Case("real", _build(5, 3, 65, real=True), _KEEP),
    Case("bilinear", _build(4, 8, 130, discretization="bilinear"), _KEEP),
    Case("bilinear_real", _build(4, 8, 30, real=True, discretization="bilinear"), _KEEP),
    Case("dirac", _build(4, 8, 33, discretization="dirac"), _KEEP),
    Case("channels", _build(4, 5, 70, lead=(2, 3)), _KEEP),
    Case("constant_B", _build(4, 5, 20, constant_B=True), _KEEP),
    Case("dt_per_state", _build(4, 5, 40, per_state=True), _KEEP),
    Case("one_state", _build(1, 1, 50), _KEEP),
    *(
        Case(f"{name}_{kind}_ends", _build(9, 4, 70, real=kind == "real", discretization=name, ends=True), _KEEP)
        for name in ("zoh", "bilinear", "dirac")
        for kind in ("pairs", "real")
    ),
    Case(
        "s4d_256x32x2048",
        _build(256, 32, 2048),
        _KEEP,
        bench=True,
        flops=4.0 * 256 * 32 * 2048,
        nbytes=4.0 * 256 * (2048 + 8 * 32),
    ),
)
