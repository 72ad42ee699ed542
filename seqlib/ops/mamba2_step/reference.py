"""A Mamba-2 layer of one token by its definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

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
    high = torch.promote_types(x.dtype, torch.float32)
    batch, nheads, d_state, headdim = state.shape
    inner, groups = nheads * headdim, (conv.shape[0] - nheads * headdim) // (2 * d_state)

    def wide(t: Tensor) -> Tensor:
        return t.to(high)

    def bias(t: Tensor | None) -> Tensor | float:
        return 0.0 if t is None else wide(t)

    def normed(t: Tensor, eps: float) -> Tensor:
        return t * torch.rsqrt(t.square().mean(-1, keepdim=True) + eps)

    entry = wide(x) if norm is None else normed(wide(x), norm_eps) * wide(norm)
    z, u, dt = (entry @ wide(in_proj).t() + bias(in_bias)).split([inner, conv.shape[0], nheads], -1)
    window = torch.cat([wide(conv_state), u.unsqueeze(1)], 1)  # (batch, d_conv, channels)
    conv_state.copy_(window[:, 1:])
    u = F.silu((window * wide(conv).t()).sum(1) + bias(conv_bias))
    u, B, C = u.split([inner, groups * d_state, groups * d_state], -1)
    u = u.view(batch, nheads, headdim)
    B, C = (t.view(batch, groups, d_state).repeat_interleave(nheads // groups, 1) for t in (B, C))
    delta = F.softplus(dt + wide(dt_bias)).clamp(dt_min, dt_max)
    decay = torch.exp(-delta * wide(A_log).exp())
    S = decay[..., None, None] * wide(state) + B.unsqueeze(-1) * (delta.unsqueeze(-1) * u).unsqueeze(-2)
    state.copy_(S)
    y = ((S * C.unsqueeze(-1)).sum(-2) + wide(D) * u).flatten(1)
    gate = F.silu(z)
    if gate_norm is None:
        y = y * gate
    else:
        y = y if norm_before_gate else y * gate
        y = normed(y.view(batch, groups, -1), eps).flatten(1) * wide(gate_norm)
        y = y * gate if norm_before_gate else y
    y = y @ wide(out_proj).t() + bias(out_bias)
    return (y if norm is None else wide(x) + y).to(x.dtype)
