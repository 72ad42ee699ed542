"""RMSNorm over torch's own fused normalisation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["rms_norm"]


def rms_norm(
    x: Tensor, weight: Tensor | None, *, gate: Tensor | None, norm_before_gate: bool, group_size: int | None, eps: float
) -> Tensor:
    high = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(high)
    if gate is not None and not norm_before_gate:
        y = y * F.silu(gate.to(high))
    if group_size in (None, y.shape[-1]):
        y = F.rms_norm(y, y.shape[-1:], None if weight is None else weight.to(high), eps)
    else:
        y = F.rms_norm(y.unflatten(-1, (-1, group_size)), (group_size,), None, eps).flatten(-2)
        y = y if weight is None else y * weight.to(high)
    if gate is not None and norm_before_gate:
        y = y * F.silu(gate.to(high))
    return y.to(x.dtype)
