"""How mixers with a matrix state end: what is read from the state is normed, gated and projected."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqlib.layers.norm import unit_length
from seqlib.layers.steps import plain, why_ops_apart
from seqlib.ops import rms_norm
from seqlib.ops.delta_rule import WIDEST_STATE
from seqlib.ops.delta_rule import step as delta_step
from seqlib.ops.linear_attention import step as attention_step

__all__ = ["NormLinear", "RatioLinear"]


class NormLinear(NamedTuple):
    """linear(rms_norm(y) * weight * activation(gate)) of y (..., nheads, headdim).

    weight: (headdim,), or (nheads * headdim,) with a group_size; None for a norm without.
    gate: (..., nheads * headdim) in the dtype of y, or None.
    activation: "silu", "sigmoid" or "none".
    group_size: features with a norm of their own, counted over all heads together; None is each head.
    """

    linear: nn.Linear
    weight: Tensor | None
    gate: Tensor | None = None
    activation: str = "silu"
    group_size: int | None = None
    eps: float = 1e-6

    def __call__(self, y: Tensor) -> Tensor:
        linear, weight, gate, activation, group_size, eps = self
        if group_size is not None:
            y = y.flatten(-2)
        if gate is None or activation == "silu":
            gate = None if gate is None else gate.view_as(y)
            y = rms_norm(y, weight, gate=gate, norm_before_gate=True, group_size=group_size, eps=eps)
        else:
            gate = torch.sigmoid(gate) if activation == "sigmoid" else gate
            y = rms_norm(y, weight, group_size=group_size, eps=eps) * gate.view_as(y)
        return linear(y.flatten(-2) if group_size is None else y)

    def step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        state: Tensor,
        *,
        beta: Tensor | None = None,
        scale: float = 1.0,
        unit: bool = False,
        config: str = "auto",
    ) -> Tensor:
        """The end of one token: of a step of `linear_attention`, or with beta of `delta_rule`.

        With `unit`, every head of q and k is brought to length 1 first (`layers.norm.unit_length`).

        On a CPU one native call, where no hook, adapter or chosen backend (`config` is that of the mixer) wants its
        parts. q, k, v and decays per channel are (batch, heads, width), or (batch, heads * width); the rest is as in
        the ops.
        """
        linear, weight, gate, activation, group_size, eps = self
        tensors = (q, k, v, beta, log_decay, state, scale, unit)
        y = _whole(linear, *tensors, "rms", weight, gate, activation, group_size or 0, eps, config)
        return self(_read(*tensors)) if y is None else y


class RatioLinear(NamedTuple):
    """linear(y[..., :-1] / (y[..., -1:] + eps)) of y (..., nheads, headdim + 1): values over what they were weighed by.

    The last column comes of a column of ones beside v. Without eps there is none, and nothing is divided. `dtype` is
    that of what linear is given.
    """

    linear: nn.Linear
    eps: float | None
    dtype: torch.dtype

    def __call__(self, y: Tensor) -> Tensor:
        if self.eps is not None:
            y = y[..., :-1] / (y[..., -1:] + self.eps)
        return self.linear(y.flatten(-2).to(self.dtype))

    def step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        state: Tensor,
        *,
        config: str = "auto",
    ) -> Tensor:
        """As `NormLinear.step`, of v (batch, nheads, headdim) without the column of ones."""
        norm, eps = ("none", 0.0) if self.eps is None else ("ratio", self.eps)
        y = _whole(
            self.linear, q, k, v, None, log_decay, state, 1.0, False, norm, None, None, "none", 0, eps, config
        )  # fmt: skip
        if y is None:
            v = v if self.eps is None else F.pad(v, (0, 1), value=1.0)
            y = self(_read(q, k, v, None, log_decay, state, 1.0, False))
        return y


def _whole(
    linear: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor,
    scale: float,
    unit: bool,
    norm: str,
    weight: Tensor | None,
    gate: Tensor | None,
    activation: str,
    group_size: int,
    eps: float,
    config: str,
) -> Tensor | None:
    """State, norm, gate and output map of one token in one call, or None where the parts are wanted."""
    maps = plain((linear,), v.shape[0], v)
    op = "linear_attention" if beta is None else "delta_rule"
    if maps is None or why_ops_apart(v, op, "norm", "linear", config=config):
        return None
    fits = state.shape[0] == v.shape[0] and state.dtype == torch.float32 and state.is_contiguous()
    alike = q.dtype == k.dtype == v.dtype and (gate is None or gate.dtype == v.dtype)
    if not (fits and alike) or (beta is not None and state.shape[2] > WIDEST_STATE):
        return None  # for the ops to refuse, or to take in another form
    (out,), (bias,) = maps
    return torch.ops.seqlib.matrix_step.default(
        q, k, v, beta, log_decay, state, scale, unit, norm, weight, gate, activation, group_size, eps, out, bias
    )


def _read(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor,
    scale: float,
    unit: bool,
) -> Tensor:
    """The step of the op."""
    nheads, d_state, _ = state.shape[1:]
    q, k = (t if t.dim() == 3 else t.unflatten(-1, (-1, d_state)) for t in (q, k))
    if unit:
        q, k = unit_length(q), unit_length(k)
    v = v if v.dim() == 3 else v.unflatten(-1, (nheads, -1))
    if log_decay is not None and log_decay.dim() == 2 and log_decay.shape[1] != nheads:
        log_decay = log_decay.unflatten(-1, (nheads, -1))
    if beta is not None:
        return delta_step(q, k, v, beta, log_decay, state, scale=scale)
    return attention_step(q, k, v, log_decay, state, scale=scale)
