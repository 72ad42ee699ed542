"""Log-decays that are to be added up."""

from __future__ import annotations

from torch import Tensor

__all__ = ["FORGETS", "summable"]

FORGETS = 1e4
"""A log-decay of minus this leaves nothing of a softmax weight, whatever the scores; lower ones count as this."""


def summable(log_decay: Tensor, largest: float = 1000.0) -> Tensor:
    """Log-decays in float64 and not below -largest, so that differences of their sums are numbers and keep small ones.

    exp(-1000) is nothing even in float64.
    """
    return log_decay.double().clamp(min=-largest)
