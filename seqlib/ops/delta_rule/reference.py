"""The delta rule by its definition, one token after another."""

from __future__ import annotations

import torch
from torch import Tensor

from seqlib.ops.documents import zero_padding
from seqlib.sequence import SequenceInfo

__all__ = ["delta_rule"]


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float,
    initial_state: Tensor | None,
    chunk_size: int | None,
    seq: SequenceInfo | None,
) -> tuple[Tensor, Tensor]:
    batch, seqlen, nheads, headdim = v.shape
    high = torch.float64 if v.dtype == torch.float64 else torch.float32
    q, k, v, beta = (zero_padding(t, seq) for t in (q, k, v, beta))
    log_decay = None if log_decay is None else zero_padding(log_decay, seq)
    q, k = (t.to(high).repeat_interleave(nheads // t.shape[2], 2) for t in (q, k))
    S = (
        v.new_zeros(batch, nheads, q.shape[-1], headdim, dtype=high)
        if initial_state is None
        else initial_state.to(high)
    )
    real = torch.ones(batch, seqlen, dtype=torch.bool, device=v.device)
    starts = torch.zeros_like(real)
    if seq is not None:
        real = real if seq.padding_mask is None else seq.padding_mask
        starts = starts if seq.starts is None else seq.starts

    ys = []
    for t in range(seqlen):
        here = real[:, t, None, None]
        R = torch.where(starts[:, t, None, None, None], 0, S)
        if log_decay is not None:
            decay = torch.exp(log_decay[:, t].to(high))  # b h or b h n
            R = (decay[..., None] if decay.dim() == 3 else decay[..., None, None]) * R
        k_t, q_t = k[:, t, :, :, None], q[:, t, :, :, None]  # b h n 1
        error = v[:, t].to(high) - (k_t * R).sum(-2)  # b h p
        after = R + k_t * (beta[:, t].to(high)[..., None] * error)[..., None, :]
        ys.append(torch.where(here, scale * (q_t * after).sum(-2), 0))
        S = torch.where(here[..., None], after, S)
    return torch.stack(ys, 1).to(v.dtype), S
