"""The linear recurrence in about 2 sqrt(seqlen) vectorised steps."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlib.sequence import SequenceInfo

__all__ = ["linear_scan"]


def linear_scan(
    a: Tensor, b: Tensor, *, initial_state: Tensor | None, reverse: bool, seq: SequenceInfo | None
) -> tuple[Tensor, Tensor]:
    high = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    out = high if high.is_complex else b.dtype
    a, b = a.to(high).expand(b.shape), b.to(high)
    h = b.new_zeros(b[:, 0].shape) if initial_state is None else initial_state.to(high)
    real = None if seq is None else seq.padding_mask
    forget = None if seq is None else _forget(seq, reverse)

    def mask(t: Tensor, where: Tensor | None, value: float) -> Tensor:
        return t if where is None else t.masked_fill(where.view(*where.shape, *[1] * (b.dim() - 2)), value)

    padded = None if real is None else ~real
    a, b = mask(a, padded, 1.0), mask(b, padded, 0.0)
    if reverse:
        a, b, forget = a.flip(1), b.flip(1), None if forget is None else forget.flip(1)
    y = _scan(a, b, h, None if forget is None else forget.view(*forget.shape, *[1] * (b.dim() - 2)))
    final = y[:, -1]
    y = mask(y.flip(1) if reverse else y, padded, 0.0)
    return y.to(out), final


def _forget(seq: SequenceInfo, reverse: bool) -> Tensor | None:
    """(batch, seqlen) True where a token takes nothing from the token scanned before it."""
    if seq.starts is None:
        return None
    starts = seq.starts if seq.padding_mask is None else seq.starts & seq.padding_mask
    if not reverse:
        return starts
    # A token forgets if the next real token has another document number; numbers never fall along a row.
    document = starts.long().cumsum(1)
    none = starts.shape[1] + 1
    after = document if seq.padding_mask is None else document.masked_fill(~seq.padding_mask, none)
    after = F.pad(after[:, 1:], (0, 1), value=none).flip(1).cummin(1).values.flip(1)
    return (after != document) & (after != none)


def _scan(a: Tensor, b: Tensor, h: Tensor, forget: Tensor | None) -> Tensor:
    """All states of the recurrence: inside all chunks at once, then from chunk to chunk, then both together.

    The decay of a span is a product that is never divided by, so nothing overflows. What is forgotten is filled with
    zeros and not multiplied by them, since it may be infinite.
    """
    batch, seqlen = b.shape[:2]
    chunk = math.isqrt(seqlen - 1) + 1
    if seqlen <= 16:
        return torch.stack(_steps(a, b, h, forget), 1)
    tail = -seqlen % chunk
    if tail:
        a = torch.cat([a, a.new_ones(batch, tail, *a.shape[2:])], 1)
        b = torch.cat([b, b.new_zeros(batch, tail, *b.shape[2:])], 1)
    a, b = a.unflatten(1, (-1, chunk)), b.unflatten(1, (-1, chunk))
    begun = None
    if forget is not None:
        forget = torch.cat([forget, forget.new_zeros(batch, tail, *forget.shape[2:])], 1).unflatten(1, (-1, chunk))
        begun = forget.cumsum(2) > 0
    zero = torch.zeros_like(b[:, :, 0])
    local = torch.stack(_steps(a, b, zero, forget, axis=2), 2)
    decay = torch.stack(_steps(a, None, torch.ones_like(zero), forget, axis=2), 2)
    ends = None if begun is None else begun[:, :, -1]
    carried = torch.stack([h, *_steps(decay[:, :, -1], local[:, :, -1], h, ends)[:-1]], 1).unsqueeze(2)
    if begun is not None:
        carried = carried.expand_as(local).masked_fill(begun, 0.0)
    return torch.addcmul(local, decay, carried).flatten(1, 2)[:, :seqlen]


def _steps(a: Tensor, b: Tensor | None, h: Tensor, forget: Tensor | None, axis: int = 1) -> list[Tensor]:
    # unbind, not indexing: its backward stacks the gradients once instead of padding each to full length.
    hs = []
    decays = a.unbind(axis)
    nothing = [None] * len(decays)
    news = nothing if b is None else b.unbind(axis)
    for a_t, b_t, forget_t in zip(decays, news, nothing if forget is None else forget.unbind(axis)):
        h = h if forget_t is None else h.masked_fill(forget_t, 0.0)
        h = a_t * h if b_t is None else torch.addcmul(b_t, a_t, h)
        hs.append(h)
    return hs
