"""Rotation of pairs of features with torch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rotate"]


def rotate(q: Tensor, k: Tensor, theta: Tensor, positions: Tensor, *, pairs: str) -> tuple[Tensor, Tensor]:
    angle = positions[..., None, None] * (theta if theta.dtype == torch.float64 else theta.float())
    cos, sin = angle.cos(), angle.sin()
    return _turned(q, cos, sin, pairs), _turned(k, cos, sin, pairs)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, pairs: str) -> Tensor:
    if pairs == "doubled":
        return torch.cat([x * cos, x * sin], -1).to(x.dtype)
    width = 2 * cos.shape[-1]
    turned = x if width == x.shape[-1] else x[..., :width]
    a, b = turned.chunk(2, -1) if pairs == "halves" else (turned[..., ::2], turned[..., 1::2])
    pair = (a * cos - b * sin, b * cos + a * sin)
    turned = (torch.cat(pair, -1) if pairs == "halves" else torch.stack(pair, -1).flatten(-2)).to(x.dtype)
    return turned if width == x.shape[-1] else torch.cat([turned, x[..., width:]], -1)
