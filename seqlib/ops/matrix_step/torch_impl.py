"""The end of one token of a mixer with a matrix state, op by op."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlib.ops.delta_rule import step as delta_step
from seqlib.ops.linear import linear
from seqlib.ops.linear_attention import step as attention_step
from seqlib.ops.norm import rms_norm, unit_length

__all__ = ["finish", "matrix_step", "read"]


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
) -> Tensor:
    y = read(q, k, v, beta, log_decay, state, scale, unit, norm)
    return finish(
        y, lambda y: linear(y.to(v.dtype), weight, bias), norm, norm_weight, gate, activation, group_size, eps
    )


def read(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor,
    scale: float,
    unit: bool,
    norm: str,
) -> Tensor:
    """The step of `delta_rule` or `linear_attention`: (batch, nheads, headdim)."""
    nheads, d_state, _ = state.shape[1:]
    q, k = (t if t.dim() == 3 else t.unflatten(-1, (-1, d_state)) for t in (q, k))
    if unit:
        q, k = unit_length(q), unit_length(k)
    v = v if v.dim() == 3 else v.unflatten(-1, (nheads, -1))
    if norm == "ratio":
        v = F.pad(v, (0, 1), value=1.0)
    if log_decay is not None and log_decay.dim() == 2 and log_decay.shape[1] != nheads:
        log_decay = log_decay.unflatten(-1, (nheads, -1))
    if beta is not None:
        return delta_step(q, k, v, beta, log_decay, state, scale=scale)
    return attention_step(q, k, v, log_decay, state, scale=scale)


def finish(
    y: Tensor,
    project: Callable[[Tensor], Tensor],
    norm: str,
    weight: Tensor | None,
    gate: Tensor | None,
    activation: str,
    group_size: int,
    eps: float,
) -> Tensor:
    """Norm, gate and `project` of y (..., nheads, headdim)."""
    if norm == "ratio":
        y = y[..., :-1] / (y[..., -1:] + eps)
    elif norm == "rms":
        y = y.flatten(-2) if group_size else y
        gate = None if gate is None else gate.view_as(y)
        if gate is None or activation == "silu":
            y = rms_norm(y, weight, gate=gate, norm_before_gate=True, group_size=group_size or None, eps=eps)
        else:
            gate = torch.sigmoid(gate) if activation == "sigmoid" else gate
            y = rms_norm(y, weight, group_size=group_size or None, eps=eps) * gate
        if group_size:
            return project(y)
    return project(y.flatten(-2))
