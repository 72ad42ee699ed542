"""RMSNorm by its definition."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rms_norm"]


def rms_norm(
    x: Tensor, weight: Tensor | None, *, gate: Tensor | None, norm_before_gate: bool, group_size: int | None, eps: float
) -> Tensor:
    high = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(high)
    silu = None if gate is None else gate.to(high) * torch.sigmoid(gate.to(high))
    if silu is not None and not norm_before_gate:
        y = y * silu
    groups = y.unflatten(-1, (-1, group_size or y.shape[-1]))
    y = (groups / torch.sqrt((groups * groups).mean(-1, keepdim=True) + eps)).flatten(-2)
    if weight is not None:
        y = y * weight.to(high)
    if silu is not None and norm_before_gate:
        y = y * silu
    return y.to(x.dtype)
