"""A linear map by its definition."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["linear"]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    high = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = (x.to(high).unsqueeze(-2) * weight.to(high)).sum(-1)
    return (y if bias is None else y + bias.to(high)).to(x.dtype)
