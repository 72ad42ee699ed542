"""A Mamba layer of one token by its definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["mamba_step"]


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
) -> Tensor:
    high = torch.promote_types(x.dtype, torch.float32)

    def wide(t: Tensor) -> Tensor:
        return t.to(high)

    def bias(t: Tensor | None) -> Tensor | float:
        return 0.0 if t is None else wide(t)

    u, z = (wide(x) @ wide(in_proj).t() + bias(in_bias)).chunk(2, -1)
    window = torch.cat([wide(conv_state), u.unsqueeze(1)], 1)  # (batch, d_conv, d_inner)
    conv_state.copy_(window[:, 1:])
    u = F.silu((window * wide(conv).t()).sum(1) + bias(conv_bias))
    d_state = A.shape[1]
    dt, B, C = (u @ wide(x_proj).t()).split([dt_proj.shape[1], d_state, d_state], -1)
    delta = F.softplus(dt @ wide(dt_proj).t() + wide(dt_bias)).unsqueeze(-1)
    h = torch.exp(delta * wide(A)) * wide(state) + delta * B.unsqueeze(1) * u.unsqueeze(-1)
    state.copy_(h)
    y = ((h * C.unsqueeze(1)).sum(-1) + wide(D) * u) * F.silu(z)
    return (y @ wide(out_proj).t() + bias(out_bias)).to(x.dtype)
