"""One token through a matrix state and what follows it: a norm, a gate and the output map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqlib.context import undisturbed
from seqlib.dispatch import Facts, Impl, Op
from seqlib.errors import UnsupportedInput
from seqlib.ops.delta_rule import WIDEST_STATE
from seqlib.ops.fused import REFUSES, few_rows_only, step_facts, writable

__all__ = ["IMPLS", "NORMS", "OP", "bind", "matrix_step"]

NORMS = ("rms", "ratio", "none")


def _limits(facts: Facts) -> str | None:
    if facts.size("corrects") and facts.size("d_state") > WIDEST_STATE:
        return f"d_state={facts.size('d_state')}; with beta it takes {WIDEST_STATE} at most"
    return few_rows_only(facts)


_HERE = "seqlib.ops.matrix_step"
IMPLS = (
    Impl(
        "native",
        "recurrent",
        f"{_HERE}.native_impl:matrix_step",
        devices=("cpu",),
        dtypes=(torch.float32, torch.bfloat16),
        needs=("native",),
        limits=_limits,
        refuses=REFUSES,
        grad=False,
    ),
    Impl("torch", "recurrent", f"{_HERE}.torch_impl:matrix_step", grad=False),
    Impl("reference", "reference", f"{_HERE}.reference:matrix_step", grad=False),
)


def facts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor,
    scale: float,
    unit: bool,
    norm: str,
    norm_weight: Tensor | None,
    gate: Tensor | None,
    activation: str,
    group_size: int,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    **_: Any,
) -> Facts:
    alike, more = (v, q, k, gate, weight, bias), (beta, log_decay, norm_weight, state)
    return step_facts(v, alike, *more, d_state=state.shape[2], corrects=beta is not None)


PARTS = ("linear_attention", "delta_rule", "norm", "linear")
OP = Op("matrix_step", IMPLS, facts, "matrix_step", parts=PARTS, writes=("state",))


@undisturbed
def matrix_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor,
    scale: float,
    unit: bool,
    norm: str,
    norm_weight: Tensor | None,
    gate: Tensor | None,
    activation: str,
    group_size: int,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    *,
    form: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """The end of one token of a mixer with a matrix state: **writes into `state`** and has no gradient.

        y = step of `delta_rule` with beta, of `linear_attention` without
        rms     out = weight (rms_norm(y) norm_weight activation(gate)) + bias
        ratio   out = weight (y[..., :-1] / (y[..., -1:] + eps)) + bias, a column of ones being added to v
        none    out = weight y + bias

    Args:
        q, k: (batch, heads, d_state) or heads side by side, (batch, heads * d_state), heads dividing nheads. With
            `unit` every head of both is brought to length 1 first.
        v: (batch, nheads, headdim), or (batch, nheads * headdim).
        beta: (batch, nheads), or None.
        log_decay: None, (nheads,) without beta, (batch, nheads), or per channel (batch, nheads, d_state), which may be
            side by side.
        state: (batch, nheads, d_state, headdim, with "ratio" headdim + 1), float32 (float64 for float64), contiguous.
        scale: of q.
        norm: "rms", "ratio" or "none"; `norm_weight`, `gate`, `activation` and `group_size` belong to "rms".
        norm_weight: (headdim,), or (nheads * headdim,) with a group_size; None is ones.
        gate: (batch, nheads * headdim), or None.
        activation: of the gate: "silu", "sigmoid" or "none".
        group_size: features with a norm of their own, counted over all heads together; 0 is each head.
        eps: of the norm or the ratio.
        weight, bias: (d_out, nheads * headdim), (d_out,) or None.

    Returns:
        (batch, d_out) in the dtype of v.

    Raises:
        UnsupportedInput: the norm is unknown, or the state does not fit or cannot be written to.

    Source: as `linear_attention` and `delta_rule`.
    """
    given = (
        q, k, v, beta, log_decay, state, scale, unit, norm, norm_weight, gate, activation, group_size, eps, weight,
        bias,
    )  # fmt: skip
    with torch.no_grad():
        return bind(*given, form=form, backend=backend)(*given)


def bind(*given: Any, form: str = "auto", backend: str = "auto") -> Any:
    """The row that runs for these arguments of `matrix_step`, and for all others of their shapes and dtypes."""
    v, state, norm = given[2], given[5], given[8]
    if norm not in NORMS:
        raise UnsupportedInput(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    if state.dim() != 4:
        raise UnsupportedInput(f"state must be (batch, nheads, d_state, headdim), got {tuple(state.shape)}")
    _, nheads, d_state, _ = state.shape
    headdim = v[0].numel() // nheads + (norm == "ratio")
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    writable("state", state, (v.shape[0], nheads, d_state, headdim), wide)
    return OP.bind(facts(*given), form, backend)
