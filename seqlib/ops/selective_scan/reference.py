"""The selective scan by its definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlib.ops.documents import zero_padding
from seqlib.sequence import SequenceInfo

__all__ = ["selective_scan"]


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    seq: SequenceInfo | None,
) -> tuple[Tensor, Tensor]:
    high = torch.float64 if x.dtype == torch.float64 else torch.float32
    wide = torch.promote_types(high, torch.cfloat) if A.is_complex() else high
    batch, seqlen, d_inner = x.shape
    x, dt, B, C = (t if t.dim() == 2 else zero_padding(t, seq) for t in (x, dt, B, C))
    z = None if z is None else zero_padding(z, seq)
    A, B, C = A.to(wide), _per_channel(B.to(wide), d_inner), _per_channel(C.to(wide), d_inner)
    h = x.new_zeros(batch, *A.shape, dtype=wide) if initial_state is None else initial_state.to(wide)
    real = torch.ones(batch, seqlen, dtype=torch.bool, device=x.device)
    starts = torch.zeros_like(real)
    if seq is not None:
        real = real if seq.padding_mask is None else seq.padding_mask
        starts = starts if seq.starts is None else seq.starts & real

    ys = []
    for t in range(seqlen):
        x_t, delta = x[:, t].to(high), dt[:, t].to(high)
        if dt_bias is not None:
            delta = delta + dt_bias.to(high)
        if dt_softplus:
            delta = F.softplus(delta)
        B_t, C_t = (M if M.dim() == 2 else M[:, t] for M in (B, C))
        kept = torch.where(starts[:, t, None, None], torch.zeros_like(h), h)
        stepped = torch.exp(delta[..., None] * A) * kept + (delta * x_t)[..., None] * B_t  # b e n
        h = torch.where(real[:, t, None, None], stepped, h)
        y = (C_t * h).sum(-1)
        y = 2 * y.real if wide.is_complex else y
        if D is not None:
            y = y + D.to(high) * x_t
        if z is not None:
            y = y * F.silu(z[:, t].to(high))
        ys.append(torch.where(real[:, t, None], y, torch.zeros_like(y)))
    return torch.stack(ys, 1).to(x.dtype), h


def _per_channel(M: Tensor, d_inner: int) -> Tensor:
    """B or C with an axis of d_inner channels; a constant one is left as it is."""
    if M.dim() == 2:
        return M
    M = M.unsqueeze(2) if M.dim() == 3 else M
    return M.repeat_interleave(d_inner // M.shape[2], 2)
