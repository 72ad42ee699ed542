"""The end of one token of a mixer with a matrix state by its definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["matrix_step"]


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
    high = torch.promote_types(v.dtype, torch.float32)
    batch, nheads, d_state, _ = state.shape

    def per_head(t: Tensor) -> Tensor:  # (batch, nheads, d_state)
        t = t.to(high).reshape(batch, -1, d_state)
        t = t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() if unit else t
        return t.repeat_interleave(nheads // t.shape[1], 1)

    queries, keys, values = per_head(q), per_head(k), v.to(high).reshape(batch, nheads, -1)
    if norm == "ratio":
        values = F.pad(values, (0, 1), value=1.0)
    S = state.to(high)
    if log_decay is not None:
        decay = log_decay.to(high).exp()
        decay = decay.expand(batch, nheads) if decay.dim() == 1 else decay.reshape(batch, nheads, -1).squeeze(-1)
        S = S * (decay[..., None, None] if decay.dim() == 2 else decay.unsqueeze(-1))
    if beta is not None:
        values = beta.to(high).unsqueeze(-1) * (values - (S * keys.unsqueeze(-1)).sum(-2))
    S = S + keys.unsqueeze(-1) * values.unsqueeze(-2)
    state.copy_(S)
    y = scale * (S * queries.unsqueeze(-1)).sum(-2)
    if norm == "ratio":
        y = y[..., :-1] / (y[..., -1:] + eps)
    elif norm == "rms":
        width = group_size or y.shape[-1]
        groups = y.reshape(batch, -1, width)
        groups = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)
        if norm_weight is not None:
            groups = groups * norm_weight.to(high).view(-1, width)
        y = groups
    y = y.reshape(batch, -1)
    if gate is not None:
        g = gate.to(high).reshape(batch, -1)
        y = y * (F.silu(g) if activation == "silu" else torch.sigmoid(g) if activation == "sigmoid" else g)
    return (y @ weight.to(high).t() + (0.0 if bias is None else bias.to(high))).to(v.dtype)
