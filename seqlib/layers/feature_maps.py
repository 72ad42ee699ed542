"""Maps of queries and keys under which a dot product stands for a kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["FEATURE_MAPS", "SIGNED", "feature_size", "taylor"]


def taylor(x: Tensor) -> Tensor:
    """Features whose dot product is the second-order Taylor polynomial of exp(q . k / sqrt(d)).

        phi(x) = [1, x / d^(1/4), x_i x_j / sqrt(d) for i < j, x_i^2 / sqrt(2 d)]
        phi(q) . phi(k) = 1 + q . k / sqrt(d) + (q . k)^2 / (2 d) >= 1/2

    Products are packed: one of each symmetric pair, so (1 + d + d (d+1) / 2) features of d.

    Source: Arora et al. 2024 (Based, arXiv 2402.18668), section 4.1.
    """
    d = x.shape[-1]
    i, j = torch.triu_indices(d, d, offset=1, device=x.device)
    pairs = x[..., i] * x[..., j] * d**-0.5
    return torch.cat([torch.ones_like(x[..., :1]), x * d**-0.25, pairs, x.square() * (2 * d) ** -0.5], -1)


SIGNED = ("identity", "elu")
"""Maps with negative values, whose sums are no denominator."""
FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "elu": F.elu,
    "elu1": lambda x: F.elu(x) + 1,
    "relu": F.relu,
    "taylor": taylor,
}


def feature_size(name: str, d: int) -> int:
    """How many features the map makes of d."""
    return 1 + d + d * (d + 1) // 2 if name == "taylor" else d
