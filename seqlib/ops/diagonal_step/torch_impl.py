"""One position of a diagonal state space in torch operations."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["diagonal_step"]


def diagonal_step(x: Tensor, decay: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor) -> Tensor:
    u = x.to(B.dtype)
    h = state.mul_(decay)
    h = torch.view_as_real(h).view(*h.shape[:-1], -1) if h.is_complex() else h
    h = h.addcmul_(B, u[..., None])
    return ((h * C).sum(-1) + D * u).to(x.dtype)
