"""Normalisation layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from seqlib.layers.init import fill_
from seqlib.ops import rms_norm

__all__ = ["RMSNorm"]


class RMSNorm(nn.Module):
    """RMSNorm over the last axis, returned in the dtype of its weight: `seqlib.ops.rms_norm` with a learned scale.

    The input may be the float32 residual stream of a 16-bit model; the mean square is always taken in float32.
    """

    def __init__(self, d: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(d))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        fill_(self.weight, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, eps=self.eps).to(self.weight.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"
