"""Normalisation layers."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from seqlib.layers.init import fill_
from seqlib.ops import rms_norm

__all__ = ["RMSNorm", "unit_length"]


def unit_length(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum of squares + eps) over the last axis, from the norm of mean squares."""
    d = x.shape[-1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    if torch.compiler.is_compiling():  # a traced tensor must not stay behind
        scale = x.new_full((d,), d**-0.5, dtype=dtype)
    else:
        scale = _unit_scale(d, dtype, x.device)
    return rms_norm(x, scale, eps=eps / d)


@functools.lru_cache(maxsize=1024)
def _unit_scale(d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # autograd could not save it later
        return torch.full((d,), d**-0.5, dtype=dtype, device=device)


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
