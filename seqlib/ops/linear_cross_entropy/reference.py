"""Cross entropy of a linear map by its definition."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["linear_cross_entropy"]


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    divisor: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float | None,
) -> Tensor:
    high = torch.float64 if x.dtype == torch.float64 else torch.float32
    logits = scale * (x.to(high) @ weight.to(high).t())
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    chances = torch.log_softmax(logits, -1)
    total = logits.new_zeros(())
    for row, target in enumerate(targets.tolist()):
        if target != ignore_index:
            total = total - chances[row, target]
    return total / divisor
