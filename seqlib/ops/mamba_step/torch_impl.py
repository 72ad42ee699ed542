"""A Mamba layer of one token, op by op."""

from __future__ import annotations

from torch import Tensor

from seqlib.ops.causal_conv1d import step as conv_step
from seqlib.ops.linear import linear
from seqlib.ops.selective_scan import step as scan_step

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
    u, z = linear(x, in_proj, in_bias).chunk(2, -1)
    u = conv_step(u.to(conv_state.dtype), conv, conv_bias, conv_state, activation="silu").to(u.dtype)
    d_state = A.shape[1]
    dt, B, C = linear(u, x_proj).split([dt_proj.shape[1], d_state, d_state], -1)
    D, dt_bias = D.to(A.dtype), dt_bias.to(A.dtype)
    y = scan_step(u, linear(dt, dt_proj), A, B, C, state, D=D, z=z, dt_bias=dt_bias, dt_softplus=True)
    return linear(y, out_proj, out_bias)
