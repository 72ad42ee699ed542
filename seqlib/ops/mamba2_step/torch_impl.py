"""A Mamba-2 layer of one token, op by op."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlib.ops.causal_conv1d import step as conv_step
from seqlib.ops.linear import linear
from seqlib.ops.linear_attention import step as attention_step
from seqlib.ops.norm import rms_norm

__all__ = ["mamba2_step"]


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
) -> Tensor:
    _, nheads, d_state, headdim = state.shape
    inner = nheads * headdim
    entry = x if norm is None else rms_norm(x, norm, eps=norm_eps).to(in_proj.dtype)
    z, u, dt = linear(entry, in_proj, in_bias).split([inner, conv.shape[0], nheads], -1)
    u = conv_step(u.to(conv_state.dtype), conv, conv_bias, conv_state, activation="silu").to(z.dtype)
    width = (conv.shape[0] - inner) // 2
    u, B, C = u.split([inner, width, width], -1)
    u, B, C = u.unflatten(-1, (nheads, -1)), B.unflatten(-1, (-1, d_state)), C.unflatten(-1, (-1, d_state))
    delta = F.softplus(dt + dt_bias.to(state.dtype)).clamp(dt_min, dt_max)
    v, log_decay = (u * delta.unsqueeze(-1)).to(u.dtype), delta * -torch.exp(A_log.to(state.dtype))
    y = torch.addcmul(attention_step(C, B, v, log_decay, state), u, D.to(u.dtype)).flatten(-2)
    if gate_norm is None:
        y = y * F.silu(z)
    else:
        group_size = inner * d_state // width  # inner over groups
        y = rms_norm(y, gate_norm, gate=z, norm_before_gate=norm_before_gate, group_size=group_size, eps=eps)
    y = linear(y, out_proj, out_bias)
    return y if norm is None else x + y
