"""Decays at the ends of their range."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["FORGETS", "decayed", "summable"]

FORGETS = 1e4
"""A log-decay of minus this leaves nothing of a softmax weight, whatever the scores; lower ones count as this."""


def summable(log_decay: Tensor, largest: float = 1000.0) -> Tensor:
    """Log-decays in float64 and not below -largest, so that differences of their sums are numbers and keep small ones.

    exp(-1000) is nothing even in float64.
    """
    return log_decay.double().clamp(min=-largest)


def decayed(decay: Tensor, state: Tensor) -> Tensor:
    """decay * state, where a decay of zero forgets infinity and NaN too."""
    return decay * torch.where(state.isfinite() | (decay != 0), state, 0)
