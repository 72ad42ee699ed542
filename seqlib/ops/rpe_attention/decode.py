"""One token of kernelized attention with relative positions, in place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlib.context import undisturbed
from seqlib.ops.rpe_attention.exponentials import Exponentials, relative_weights
from seqlib.ops.rpe_attention.state import ExponentialState, WindowState, check_state

__all__ = ["step"]


@undisturbed
@torch.no_grad()
def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    state: WindowState | ExponentialState,
    *,
    exponentials: Exponentials | None = None,
) -> Tensor:
    """Attend one new token per row to itself and to the state, which takes it up in place.

    Args:
        q, k: (batch, nheads, d_feature), v: (batch, nheads, headdim).
        bias: (nheads, window), causal.
        state: a WindowState of capacity = window; with exponentials an ExponentialState.

    Returns:
        (batch, nheads, headdim) in the dtype of v. Has no gradient.

    Raises:
        UnsupportedInput: the state does not fit.
    """
    window = bias.shape[1]
    check_state(state, q, v, window, exponentials)
    high = torch.promote_types(q.dtype, torch.float32)
    weights = relative_weights(bias).to(high)
    if isinstance(state, WindowState):
        rows = torch.arange(q.shape[0], device=q.device)
        state.k[rows, state.length % window] = k
        state.v[rows, state.length % window] = v
        state.length += 1
        slots = torch.arange(window, device=q.device)
        distance = (state.length[:, None] - 1 - slots) % window  # b s
        live = slots < state.length[:, None]
        table = weights[:, distance].transpose(0, 1) * live[:, None]  # b h s
        scores = torch.einsum("bhn,bshn->bhs", q.to(high), state.k.to(high)) * table
        sums = torch.einsum("bhs,bshp->bhp", scores, F.pad(state.v.to(high), (0, 1), value=1.0))
    else:
        assert exponentials is not None
        dtype = state.sums.dtype
        rates = exponentials.rates.to(dtype)
        state.sums *= rates[..., None, None]
        token = k.to(high)[..., None] * F.pad(v.to(high), (0, 1), value=1.0)[..., None, :]
        read = q.to(dtype)[:, :, None] * exponentials.weights.to(dtype)[..., None]  # b h m n
        sums = (read.flatten(2)[:, :, None] @ state.sums.flatten(2, 3)).real[:, :, 0]
        sums = sums + weights[:, :1] * (q.to(high)[:, :, None] @ token)[:, :, 0]
        state.sums += token[:, :, None]
    return (sums[..., :-1] / sums[..., -1:]).to(v.dtype)
