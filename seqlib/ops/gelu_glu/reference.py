"""The gated readout by its definition."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["gelu_glu"]


def gelu_glu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    high = torch.float64 if x.dtype == torch.float64 else torch.float32
    u = x.to(high)
    a = u * (1 + torch.erf(u / math.sqrt(2))) / 2
    mixed = (a.unsqueeze(-2) * weight.to(high)).sum(-1)
    v, g = (mixed if bias is None else mixed + bias.to(high)).chunk(2, -1)
    return (v * torch.sigmoid(g)).to(x.dtype)
