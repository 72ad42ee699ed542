"""Normalisation layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from seqlib.layers.init import fill_
from seqlib.ops import rms_norm

__all__ = ["RMSNorm"]


class RMSNorm(nn.Module):
    """RMSNorm over the last axis, returned in the dtype of its weight: `seqlib.ops.rms_norm` with a learned scale.

    The input may be the float32 residual stream of a 16-bit model; the mean square is always taken in float32. The
    scale is weight + offset and starts at 1.
    """

    def __init__(self, d: int, eps: float = 1e-5, offset: float = 0.0) -> None:
        super().__init__()
        self.eps, self.offset = eps, offset
        self.weight = nn.Parameter(torch.empty(d))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        fill_(self.weight, 1.0 - self.offset)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight + self.offset if self.offset else self.weight
        return rms_norm(x, scale, eps=self.eps).to(self.weight.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}" + (f", offset={self.offset}" if self.offset else "")
