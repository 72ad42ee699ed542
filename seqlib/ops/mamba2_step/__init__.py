"""One token through a whole Mamba-2 layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqlib.context import undisturbed
from seqlib.dispatch import Facts, Impl, Op
from seqlib.errors import UnsupportedInput
from seqlib.ops.fused import REFUSES, few_rows_only, step_facts, writable
from seqlib.ops.linear import WIDEST

__all__ = ["IMPLS", "OP", "bind", "mamba2_step"]

_TAPS = 4  # of a convolution in the kernel
_STREAM = "a residual stream that is neither float32 nor in the dtype of the weights"
_STATE = "a state that is not float32"


def _limits(facts: Facts) -> str | None:
    taps, headdim, widest = facts.size("d_conv"), facts.size("headdim"), max(facts.size("d_in"), facts.size("d_inner"))
    if taps > _TAPS or headdim % 4 or widest > WIDEST:
        return (
            f"d_conv={taps}, headdim={headdim} and width {widest}; it takes d_conv up to {_TAPS}, headdim in fours and "
            f"widths up to {WIDEST}"
        )
    if facts.size("normed") and facts.size("d_in") % 4:
        return f"d_model={facts.size('d_in')}; with a norm it takes multiples of four"
    return few_rows_only(facts)


_HERE = "seqlib.ops.mamba2_step"
_NATIVE = REFUSES | {_STREAM, _STATE}
IMPLS = (
    Impl(
        "native",
        "recurrent",
        f"{_HERE}.native_impl:mamba2_step",
        devices=("cpu",),
        dtypes=(torch.float32, torch.bfloat16),
        needs=("native",),
        limits=_limits,
        refuses=_NATIVE,
        grad=False,
    ),
    Impl(
        "native",
        "recurrent",
        f"{_HERE}.native_impl:mamba2_step",
        devices=("cuda",),
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        needs=("native:cuda",),
        limits=_limits,
        refuses=_NATIVE,
        grad=False,
    ),
    Impl("torch", "recurrent", f"{_HERE}.torch_impl:mamba2_step", grad=False),
    Impl("reference", "reference", f"{_HERE}.reference:mamba2_step", grad=False),
)


def facts(
    x: Tensor,
    norm: Tensor | None,
    norm_eps: float,
    in_proj: Tensor,
    in_bias: Tensor | None,
    conv: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    dt_min: float,
    dt_max: float,
    gate_norm: Tensor | None,
    eps: float,
    norm_before_gate: bool,
    out_proj: Tensor,
    out_bias: Tensor | None,
    conv_state: Tensor,
    state: Tensor,
    **_: Any,
) -> Facts:
    alike = (in_proj, norm, in_bias, conv, conv_bias, gate_norm, out_proj, out_bias, conv_state)
    known = step_facts(
        x, alike, dt_bias, A_log, D, state, d_conv=conv.shape[1], headdim=state.shape[3], d_in=x.shape[1],
        d_inner=out_proj.shape[1], normed=norm is not None,
    )  # fmt: skip
    more = set()
    if x.dtype not in ((in_proj.dtype,) if norm is None else (in_proj.dtype, torch.float32)):
        more.add(_STREAM)
    if state.dtype != torch.float32:
        more.add(_STATE)
    return known._replace(features=known.features | more)


OP = Op(
    "mamba2_step",
    IMPLS,
    facts,
    "mamba2_step",
    parts=("linear", "causal_conv1d", "linear_attention", "norm"),
    writes=("conv_state", "state"),
)


@undisturbed
def mamba2_step(
    x: Tensor,
    norm: Tensor | None,
    norm_eps: float,
    in_proj: Tensor,
    in_bias: Tensor | None,
    conv: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    dt_min: float,
    dt_max: float,
    gate_norm: Tensor | None,
    eps: float,
    norm_before_gate: bool,
    out_proj: Tensor,
    out_bias: Tensor | None,
    conv_state: Tensor,
    state: Tensor,
    *,
    form: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """A Mamba-2 layer on one token, for decoding: **writes into `conv_state` and `state`** and has no gradient.

        z, u, dt = in_proj x + in_bias;  u, B, C = silu(conv of the last d_conv inputs u)
        delta = clamp(softplus(dt + dt_bias), dt_min, dt_max);  S = exp(-delta exp(A_log)) S + B^T (delta u)
        y = out_proj(rms_norm((C S + D u) silu(z)) gate_norm) + out_bias

    With `norm` it is a whole residual branch: x + y of rms_norm(x) norm.

    Args:
        x: (batch, d_model); with `norm` the residual stream, in its own dtype.
        norm, norm_eps: (d_model,) or None.
        in_proj, in_bias: (2 d_inner + 2 ngroups d_state + nheads, d_model); rows are z, u, B, C, dt.
        conv, conv_bias: (d_inner + 2 ngroups d_state, d_conv), one value per channel or None.
        dt_bias, A_log: (nheads,).
        D: (nheads, 1) or (nheads, headdim).
        dt_min, dt_max: limits of delta; math.inf is none.
        gate_norm: (d_inner,), or None: only the gate. `norm_before_gate` gates what is normed already.
        eps: of the gated norm, taken over each of the ngroups.
        out_proj, out_bias: (d_out, d_inner), (d_out,) or None.
        conv_state: (batch, d_conv - 1, channels) in the dtype of the weights, the last inputs, oldest first.
        state: (batch, nheads, d_state, headdim), float32 (float64 for float64 weights), contiguous.

    Returns:
        (batch, d_out) in the dtype of x.

    Raises:
        UnsupportedInput: a state does not fit, or cannot be written to.

    Source: Dao and Gu 2024 (arXiv 2405.21060), section 7; state-spaces/mamba, modules/mamba2.py, Mamba2.step.
    """
    given = (
        x, norm, norm_eps, in_proj, in_bias, conv, conv_bias, dt_bias, A_log, D, dt_min, dt_max, gate_norm, eps,
        norm_before_gate, out_proj, out_bias, conv_state, state,
    )  # fmt: skip
    with torch.no_grad():
        return bind(*given, form=form, backend=backend)(*given)


def bind(*given: Any, form: str = "auto", backend: str = "auto") -> Any:
    """The row that runs for these arguments of `mamba2_step`, and for all others of their shapes and dtypes."""
    x, in_proj, conv, A_log, out_proj, conv_state, state = (given[i] for i in (0, 3, 5, 8, 15, 17, 18))
    if x.dim() != 2 or x.shape[-1:] != in_proj.shape[1:] or 0 in x.shape:
        raise UnsupportedInput(f"x must be (batch, {in_proj.shape[1]}), none of them 0, got {tuple(x.shape)}")
    nheads, inner = A_log.numel(), out_proj.shape[1]
    d_state = state.shape[2] if state.dim() == 4 else 0
    groups = (conv.shape[0] - inner) // max(1, 2 * d_state)
    writable("conv_state", conv_state, (x.shape[0], conv.shape[1] - 1, conv.shape[0]), conv_state.dtype)
    wide = torch.float64 if in_proj.dtype == torch.float64 else torch.float32
    writable("state", state, (x.shape[0], nheads, d_state, inner // nheads), wide)
    if conv.shape[0] != inner + 2 * groups * d_state or groups < 1 or nheads % groups:
        raise UnsupportedInput(
            f"conv must have d_inner + 2 ngroups d_state = {inner} + 2 ngroups {d_state} channels, ngroups dividing "
            f"nheads={nheads}, got {conv.shape[0]}"
        )
    return OP.bind(facts(*given), form, backend)
