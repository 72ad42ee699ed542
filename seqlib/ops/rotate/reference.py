"""Rotation of pairs of features by its definition, pair by pair."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rotate"]


def rotate(q: Tensor, k: Tensor, theta: Tensor, positions: Tensor, *, pairs: str) -> tuple[Tensor, Tensor]:
    angle = positions[..., None, None] * theta.to(torch.promote_types(theta.dtype, torch.float32))
    count = theta.shape[-1]

    def turned(x: Tensor) -> Tensor:
        made = [*x.unbind(-1), *(torch.zeros_like(x).unbind(-1) if pairs == "doubled" else ())]
        for i in range(count):
            first, second = (2 * i, 2 * i + 1) if pairs == "neighbours" else (i, i + count)
            a, b, cos, sin = made[first], made[second], angle[..., i].cos(), angle[..., i].sin()
            made[first], made[second] = a * cos - b * sin, b * cos + a * sin
        return torch.stack([t.to(x.dtype) for t in made], -1)

    return turned(q), turned(k)
