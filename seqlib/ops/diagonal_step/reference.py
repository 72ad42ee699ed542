"""One position of a diagonal state space by its definition."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["diagonal_step"]


def diagonal_step(x: Tensor, decay: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor) -> Tensor:
    u = x.to(torch.promote_types(x.dtype, torch.float32))

    def numbers(t: Tensor) -> Tensor:
        return torch.complex(t[..., 0::2], t[..., 1::2]) if decay.is_complex() else t

    state.copy_(decay * state + numbers(B) * u.unsqueeze(-1))
    y = (state * numbers(C).conj()).sum(-1).real + D * u
    return y.to(x.dtype)
