"""The two ends of a span of a diagonal state space: what the state before it adds, and the state after it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlib.ops.ssm_kernel.torch_impl import powers, real_pairs, tables

__all__ = ["final_state", "state_outputs"]


def state_outputs(log_decay: Tensor, C: Tensor, state: Tensor, length: int, *, pairs: bool) -> Tensor:
    """The part of the outputs of a span that comes from the state before it.

        y[l] = (2 if pairs else 1) Re sum_n C_n exp((l + 1) log_decay_n) state_n,  l = 0 .. length-1

    Args:
        log_decay: (d, d_state) of `discretize`.
        C: (d, d_state).
        state: (batch, d, d_state), real or complex; its precision is that of the result.
        length: positions, >= 1.
        pairs: whether complex states stand for conjugate pairs.

    Returns:
        (batch, length, d), real.
    """
    high = state.dtype.to_real()
    with torch.autocast(state.device.type, enabled=False):
        size, count = tables(length)
        coarse = powers(log_decay, high, count, first=1, step=size)  # d a n
        fine = powers(log_decay, high, size)
        wide = torch.promote_types(torch.promote_types(state.dtype, coarse.dtype), _narrow(C.dtype, high))
        left = ((2 if pairs else 1) * C * state).to(wide).transpose(0, 1)[:, :, None] * coarse[:, None]  # d b a n
        right = fine.to(wide)
        y = real_pairs(left.flatten(1, 2)) @ real_pairs(right, conjugate=True).mT  # d ba size
        return y.view(len(y), -1, count * size)[..., :length].permute(1, 2, 0)


def final_state(log_decay: Tensor, B_bar: Tensor, x: Tensor, initial_state: Tensor | None = None) -> Tensor:
    """The state after a span of inputs.

        h_n = exp(length log_decay_n) h0_n + sum_l exp((length - 1 - l) log_decay_n) B_bar_n x[l]

    Args:
        log_decay, B_bar: (d, d_state) of `discretize`.
        x: (batch, length, d).
        initial_state: (batch, d, d_state); None is zero.

    Returns:
        (batch, d, d_state) in the precision of the initial state, else float32 (float64 for float64 x); complex where
        log_decay or B_bar is.
    """
    real = x.dtype if initial_state is None else initial_state.dtype.to_real()
    high = torch.float64 if real == torch.float64 else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        batch, length, d = x.shape
        size, count = tables(length)
        u = F.pad(x.to(high), (0, 0, count * size - length, 0)).view(batch, count, size, d).permute(3, 0, 1, 2)
        fine = powers(log_decay, high, size).flip(1)  # d size n
        coarse = powers(log_decay, high, count, step=size).flip(1)  # d a n
        part = u.flatten(1, 2) @ real_pairs(fine)
        blocks = part.view(d, batch, count, -1)
        if fine.is_complex():
            blocks = torch.view_as_complex(blocks.unflatten(-1, (-1, 2)))
        wide = torch.promote_types(blocks.dtype, _narrow(B_bar.dtype, high))
        h = ((blocks * coarse[:, None]).sum(2) * B_bar.to(wide)[:, None]).transpose(0, 1)
        if initial_state is not None:
            h = h + powers(log_decay, high, 1, first=length)[:, 0] * initial_state
        return h


def _narrow(dtype: torch.dtype, high: torch.dtype) -> torch.dtype:
    return high.to_complex() if dtype.is_complex else high
