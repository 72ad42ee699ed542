"""The gated readout by torch's parts."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["gelu_glu"]


def gelu_glu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.glu(F.linear(F.gelu(x), weight.to(x.dtype), None if bias is None else bias.to(x.dtype)), -1)
