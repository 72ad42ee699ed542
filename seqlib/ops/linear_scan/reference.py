"""The linear recurrence by its definition."""

from __future__ import annotations

import torch
from torch import Tensor

from seqlib.ops.documents import zero_padding
from seqlib.sequence import SequenceInfo

__all__ = ["linear_scan"]


def linear_scan(
    a: Tensor, b: Tensor, *, initial_state: Tensor | None, reverse: bool, seq: SequenceInfo | None
) -> tuple[Tensor, Tensor]:
    high = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b_high = (zero_padding(t, seq) for t in (a.to(high).expand(b.shape), b.to(high)))
    batch, seqlen = b.shape[:2]
    h = b_high.new_zeros(b_high[:, 0].shape) if initial_state is None else initial_state.to(high)
    starts = None if seq is None else seq.starts
    real = None if seq is None else seq.padding_mask
    starts = torch.zeros(batch, seqlen, dtype=torch.bool, device=b.device) if starts is None else starts
    real = torch.ones_like(starts) if real is None else real

    def where(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
        return torch.where(mask.view(-1, *[1] * (b.dim() - 2)), yes, no)

    zero = torch.zeros_like(h)
    left = torch.zeros_like(starts[:, 0])  # reverse: the token before was the first of its document
    hs: dict[int, Tensor] = {}
    for t in reversed(range(seqlen)) if reverse else range(seqlen):
        forget = real[:, t] & (left if reverse else starts[:, t])
        h = where(real[:, t], a[:, t] * where(forget, zero, h) + b_high[:, t], h)
        left = torch.where(real[:, t], starts[:, t], left)
        hs[t] = where(real[:, t], h, zero)
    y = torch.stack([hs[t] for t in range(seqlen)], 1)
    return y if high.is_complex else y.to(b.dtype), h
