"""One token through a whole Mamba layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqlib.context import undisturbed
from seqlib.dispatch import Facts, Impl, Op
from seqlib.errors import UnsupportedInput
from seqlib.ops.fused import REFUSES, few_rows_only, step_facts, writable

__all__ = ["IMPLS", "OP", "bind", "mamba_step"]

_HERE = "seqlib.ops.mamba_step"
IMPLS = (
    Impl(
        "native",
        "recurrent",
        f"{_HERE}.native_impl:mamba_step",
        devices=("cpu",),
        dtypes=(torch.float32, torch.bfloat16),
        needs=("native",),
        limits=few_rows_only,
        refuses=REFUSES,
        grad=False,
    ),
    Impl("torch", "recurrent", f"{_HERE}.torch_impl:mamba_step", grad=False),
    Impl("reference", "reference", f"{_HERE}.reference:mamba_step", grad=False),
)


def facts(
    x: Tensor,
    in_proj: Tensor,
    in_bias: Tensor | None,
    conv: Tensor,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    out_proj: Tensor,
    out_bias: Tensor | None,
    conv_state: Tensor,
    state: Tensor,
    **_: Any,
) -> Facts:
    alike = (in_proj, x, in_bias, conv, conv_bias, x_proj, dt_proj, out_proj, out_bias, conv_state)
    return step_facts(x, alike, dt_bias, A, D, state)


OP = Op(
    "mamba_step",
    IMPLS,
    facts,
    "mamba_step",
    parts=("linear", "causal_conv1d", "selective_scan"),
    writes=("conv_state", "state"),
)


@undisturbed
def mamba_step(
    x: Tensor,
    in_proj: Tensor,
    in_bias: Tensor | None,
    conv: Tensor,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    out_proj: Tensor,
    out_bias: Tensor | None,
    conv_state: Tensor,
    state: Tensor,
    *,
    form: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """A Mamba layer on one token, for decoding: **writes into `conv_state` and `state`** and has no gradient.

        u, z = in_proj x + in_bias;  u = silu(conv of the last d_conv inputs u);  dt, B, C = x_proj u
        delta = softplus(dt_proj dt + dt_bias);  h = exp(delta A) h + delta B u
        y = out_proj((C h + D u) silu(z)) + out_bias

    Args:
        x: (batch, d_model).
        in_proj, in_bias: (2 d_inner, d_model), (2 d_inner,) or None.
        conv, conv_bias: (d_inner, d_conv), (d_inner,) or None.
        x_proj, dt_proj: (dt_rank + 2 d_state, d_inner), (d_inner, dt_rank).
        dt_bias, D: (d_inner,).
        A: (d_inner, d_state), negative.
        out_proj, out_bias: (d_out, d_inner), (d_out,) or None.
        conv_state: (batch, d_conv - 1, d_inner) in the dtype of x, the last inputs, oldest first.
        state: (batch, d_inner, d_state), float32 (float64 for float64 inputs), contiguous.

    Returns:
        y (batch, d_out) in the dtype of x.

    Raises:
        UnsupportedInput: a state does not fit, or cannot be written to.

    Source: Gu and Dao 2023 (arXiv 2312.00752), algorithm 2; state-spaces/mamba, modules/mamba_simple.py, Mamba.step.
    """
    given = (
        x, in_proj, in_bias, conv, conv_bias, x_proj, dt_proj, dt_bias, A, D, out_proj, out_bias, conv_state, state,
    )  # fmt: skip
    with torch.no_grad():
        return bind(*given, form=form, backend=backend)(*given)


def bind(*given: Any, form: str = "auto", backend: str = "auto") -> Any:
    """The row that runs for these arguments of `mamba_step`, and for all others of their shapes and dtypes."""
    x, in_proj, A, conv, conv_state, state = (given[i] for i in (0, 1, 8, 3, 12, 13))
    if x.dim() != 2 or x.shape[-1:] != in_proj.shape[1:] or 0 in x.shape:
        raise UnsupportedInput(f"x must be (batch, {in_proj.shape[1]}), none of them 0, got {tuple(x.shape)}")
    writable("conv_state", conv_state, (x.shape[0], conv.shape[1] - 1, conv.shape[0]), conv_state.dtype)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    writable("state", state, (x.shape[0], *A.shape), wide)
    return OP.bind(facts(*given), form, backend)
