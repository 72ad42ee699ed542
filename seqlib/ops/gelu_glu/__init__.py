"""What follows a state-space layer's convolution: an activation, a product that mixes channels, and a gate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqlib.context import undisturbed
from seqlib.dispatch import Facts, Impl, Op
from seqlib.errors import UnsupportedInput

__all__ = ["IMPLS", "OP", "gelu_glu"]

MANY_ROWS = 64
"""From here on blocks of rows are worth packing the weight for."""


def _limits(facts: Facts) -> str | None:
    rows, d_in = facts.size("rows"), facts.size("d_in")
    small = rows < MANY_ROWS or d_in < 32
    return f"{rows} rows of width {d_in}; it takes at least {MANY_ROWS} rows of width 32" if small else None


_HERE = "seqlib.ops.gelu_glu"
IMPLS = (
    Impl(
        "native",
        "parallel",
        f"{_HERE}.native_impl:gelu_glu",
        devices=("cpu",),
        dtypes=(torch.float32,),
        needs=("native",),
        limits=_limits,
    ),
    Impl("torch", "parallel", f"{_HERE}.torch_impl:gelu_glu"),
    Impl("reference", "reference", f"{_HERE}.reference:gelu_glu"),
)


def facts(x: Tensor, weight: Tensor, bias: Tensor | None = None, **_: Any) -> Facts:
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    d_in = x.shape[-1]
    sizes = (("rows", x.numel() // max(1, d_in)), ("d_in", d_in))
    return Facts(x.device.type, x.dtype, 1, needs_grad, sizes=sizes)


OP = Op("gelu_glu", IMPLS, facts, "gelu_glu")


@undisturbed
def gelu_glu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, form: str = "auto", backend: str = "auto"
) -> Tensor:
    """y = v * sigmoid(g),  v, g = gelu(x) weight^T + bias,  gelu(x) = x Phi(x).

    Args:
        x: (..., d_in).
        weight: (2 d_out, d_in); the first d_out rows make v, the others g.
        bias: (2 d_out,) or None.

    Returns:
        (..., d_out) in the dtype of x.

    Raises:
        UnsupportedInput: shapes or devices do not fit.

    Cost: 4 d_in d_out operations per row. Gradients keep x, v and g.

    Source: Gu et al. 2022 (state-spaces/s4, models/s4/s4d.py, output_linear).
    """
    if weight.dim() != 2 or weight.shape[0] % 2 or x.shape[-1:] != weight.shape[1:]:
        raise UnsupportedInput(f"weight must be (2 d_out, {x.shape[-1]}) for this x, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise UnsupportedInput(f"bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")
    if weight.device != x.device or (bias is not None and bias.device != x.device):
        raise UnsupportedInput("x, weight and bias must be on one device; move them with .to(x.device)")
    return OP.choose(facts(x, weight, bias), form, backend)(x, weight, bias)
