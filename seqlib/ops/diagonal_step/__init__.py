"""One position of a diagonal state space per channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqlib.context import undisturbed
from seqlib.dispatch import Facts, Impl, Op
from seqlib.errors import UnsupportedInput
from seqlib.ops.fused import REFUSES, step_facts, writable

__all__ = ["IMPLS", "OP", "bind", "diagonal_step"]

_HERE = "seqlib.ops.diagonal_step"
_STRIDED = "a state that is not contiguous"
IMPLS = (
    Impl(
        "native",
        "recurrent",
        f"{_HERE}.native_impl:diagonal_step",
        devices=("cpu",),
        dtypes=(torch.float32,),
        needs=("native",),
        refuses=REFUSES | {_STRIDED},
        grad=False,
    ),
    Impl("torch", "recurrent", f"{_HERE}.torch_impl:diagonal_step", grad=False),
    Impl("reference", "reference", f"{_HERE}.reference:diagonal_step", grad=False),
)


def facts(x: Tensor, decay: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor, **_: Any) -> Facts:
    known = step_facts(x, (x, B, C, D), decay, state)
    return known if state.is_contiguous() else known._replace(features=known.features | {_STRIDED})


OP = Op("diagonal_step", IMPLS, facts, "diagonal_step", parts=("long_conv",), writes=("state",))


@undisturbed
def diagonal_step(
    x: Tensor,
    decay: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor,
    *,
    form: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """One position of the convolution that a diagonal state space is: **writes into `state`**, has no gradient.

        h = decay h + B x;  y = C h + D x,   products of real numbers, complex states being pairs of them

    Args:
        x: (batch, d).
        decay: (d, n), real or complex.
        B, C: (d, n), or (d, 2n) real and imaginary parts by turns; C conjugated.
        D: (d,).
        state: (batch, d, n) in the dtype of decay; the native row wants it contiguous.

    Returns:
        y (batch, d) in the dtype of x.

    Raises:
        UnsupportedInput: shapes do not fit, or the state cannot be written to.

    Source: Gu et al. 2022 (arXiv 2206.11893), equation 2 and section 3.
    """
    given = (x, decay, B, C, D, state)
    with torch.no_grad():
        return bind(*given, form=form, backend=backend)(*given)


def bind(*given: Any, form: str = "auto", backend: str = "auto") -> Any:
    """The row that runs for these arguments of `diagonal_step`, and for all others of their shapes and dtypes."""
    x, decay, B, C, D, state = given
    d, n = decay.shape
    if x.dim() != 2 or x.shape[1] != d or 0 in x.shape:
        raise UnsupportedInput(f"x must be (batch, {d}), none of them 0, got {tuple(x.shape)}")
    wanted = (d, 2 * n if decay.is_complex() else n)
    if tuple(B.shape) != wanted or tuple(C.shape) != wanted or tuple(D.shape) != (d,):
        raise UnsupportedInput(
            f"B and C must be {wanted} and D ({d},), got {tuple(B.shape)}, {tuple(C.shape)} and {tuple(D.shape)}"
        )
    writable("state", state, (x.shape[0], d, n), decay.dtype, strided=True)
    return OP.bind(facts(*given), form, backend)
