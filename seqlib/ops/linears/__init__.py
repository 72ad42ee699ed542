"""Several linear maps of one input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqlib.context import undisturbed
from seqlib.dispatch import Facts, Impl, Op
from seqlib.errors import UnsupportedInput
from seqlib.ops.fused import REFUSES, few_rows_only, step_facts

__all__ = ["IMPLS", "OP", "bind", "linears"]

_HERE = "seqlib.ops.linears"
IMPLS = (
    Impl(
        "native",
        "parallel",
        f"{_HERE}.native_impl:linears",
        devices=("cpu",),
        dtypes=(torch.float32, torch.bfloat16),
        needs=("native",),
        limits=few_rows_only,
        refuses=REFUSES,
        grad=False,
    ),
    Impl("torch", "parallel", f"{_HERE}.torch_impl:linears"),
    Impl("reference", "reference", f"{_HERE}.reference:linears"),
)


def facts(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], **_: Any) -> Facts:
    known = step_facts(x, (x, *weights, *biases))
    return known._replace(sizes=(("rows", x.numel() // max(1, x.shape[-1])),))


OP = Op("linears", IMPLS, facts, "linears", parts=("linear",))


@undisturbed
def linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    form: str = "auto",
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """y_i = x weights_i^T + biases_i: as many calls of `linear`, which for a few rows are one.

    Args:
        x: (..., d_in).
        weights: each (d_out_i, d_in).
        biases: as many, each (d_out_i,) or None.

    Returns:
        One (..., d_out_i) for each weight, in the dtype of x.

    Raises:
        UnsupportedInput: shapes do not fit.
    """
    return bind(x, weights, biases, form=form, backend=backend)(x, weights, biases)


def bind(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], *, form: str = "auto", backend: str = "auto"
) -> Any:
    """The row that runs for these arguments of `linears`, and for all others of their shapes and dtypes."""
    if len(weights) != len(biases) or not weights:
        raise UnsupportedInput(f"there must be a bias or None for each weight, got {len(weights)} and {len(biases)}")
    for weight in weights:
        if weight.dim() != 2 or x.shape[-1:] != weight.shape[1:]:
            raise UnsupportedInput(f"weights must be (d_out, {x.shape[-1]}) for this x, got {tuple(weight.shape)}")
    return OP.bind(facts(x, weights, biases), form, backend)
