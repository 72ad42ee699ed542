"""A linear map, fast where decoding needs it: for a few rows, when reading the weight is all the work."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqlib.context import undisturbed
from seqlib.dispatch import Facts, Impl, Op, preferred, remembered
from seqlib.errors import UnsupportedInput

__all__ = ["FEW_ROWS", "IMPLS", "OP", "WIDEST", "few_rows", "linear"]

FEW_ROWS = 8
"""Up to here one pass over the weight serves all rows; beyond, a matrix product is the better tool."""

WIDEST = 24576
"""Features of a row, in float32, that fit into the shared memory of every GPU."""


def _limits(facts: Facts) -> str | None:
    rows = facts.size("rows")
    return f"{rows} rows; it takes {FEW_ROWS} at most, where the weight is read once" if rows > FEW_ROWS else None


def _cuda_limits(facts: Facts) -> str | None:
    wide = facts.size("d_in") > WIDEST
    return f"{facts.size('d_in')} features; it takes {WIDEST} at most" if wide else _limits(facts)


_HERE = "seqlib.ops.linear"
_MIXED, _UNREAD = "a weight of another dtype", "a weight or bias that is neither float32 nor bfloat16"
IMPLS = (
    Impl(
        "native",
        "parallel",
        f"{_HERE}.native_impl:linear",
        devices=("cpu",),
        dtypes=(torch.float32, torch.bfloat16),
        needs=("native",),
        limits=_limits,
        refuses=frozenset({_UNREAD}),
        grad=False,
    ),
    Impl(
        "native",
        "parallel",
        f"{_HERE}.native_impl:linear",
        devices=("cuda",),
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        needs=("native:cuda",),
        limits=_cuda_limits,
        refuses=frozenset({_MIXED}),
        grad=False,
    ),
    Impl("torch", "parallel", f"{_HERE}.torch_impl:linear"),
    Impl("reference", "reference", f"{_HERE}.reference:linear"),
)


def facts(x: Tensor, weight: Tensor, bias: Tensor | None = None, **_: Any) -> Facts:
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    features = {_MIXED} if weight.dtype != x.dtype else set()
    if any(t is not None and t.dtype not in (torch.float32, torch.bfloat16) for t in (weight, bias)):
        features.add(_UNREAD)
    d_in = x.shape[-1]
    return Facts(
        x.device.type,
        x.dtype,
        1,
        needs_grad,
        frozenset(features),
        (("rows", x.numel() // max(1, d_in)), ("d_in", d_in)),
    )


OP = Op("linear", IMPLS, facts, "linear")


@undisturbed
def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, form: str = "auto", backend: str = "auto"
) -> Tensor:
    """y = x weight^T + bias, accumulated in float32 (float64 for float64 inputs).

    Args:
        x: (..., d_in).
        weight: (d_out, d_in), any float dtype. The native row reads it as stored, one pass for up to `FEW_ROWS` rows.
        bias: (d_out,) or None.

    Returns:
        (..., d_out) in the dtype of x.

    Raises:
        UnsupportedInput: shapes or devices do not fit.

    Cost: reading the weight, d_in * d_out elements, while there are few rows.
    """
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[1:]:
        raise UnsupportedInput(f"weight must be (d_out, {x.shape[-1]}) for this x, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise UnsupportedInput(f"bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")
    if weight.device != x.device or (bias is not None and bias.device != x.device):
        raise UnsupportedInput("x, weight and bias must be on one device; move them with .to(x.device)")
    return OP.choose(facts(x, weight, bias), form, backend)(x, weight, bias)


def few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` of up to FEW_ROWS rows in one dtype, without gradient or checks: dozens of layers call it per token.

    Which row runs depends on dtype, device, backend and whether rows are very wide, so that is all that is looked at.
    """
    if torch.compiler.is_compiling():
        return linear(x, weight, bias)
    key = ("few rows", x.dtype, x.device.type, preferred("linear"), x.shape[-1] > WIDEST)
    return remembered(key, lambda: OP.choose(facts(x, weight, bias)))(x, weight, bias)
