"""The causal convolution as d_conv shifted products over the whole span."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlib.sequence import SequenceInfo

__all__ = ["causal_conv1d", "step"]


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str | None,
    initial_state: Tensor | None,
    seq: SequenceInfo | None,
) -> tuple[Tensor, Tensor]:
    past = weight.shape[1] - 1
    state = x.new_zeros(x.shape[0], past, x.shape[2]) if initial_state is None else initial_state
    starts = seq.starts if seq is not None else None
    mask = seq.padding_mask if seq is not None else None
    if mask is None:
        return _dense(x, weight, bias, activation, state, starts, None)
    # Real tokens move to the front of their row, and their outputs back.
    order = mask.logical_not().to(torch.int8).argsort(dim=1, stable=True)
    gathered = torch.where(mask[..., None], x, 0).gather(1, order[..., None].expand_as(x))
    starts = None if starts is None else (starts & mask).gather(1, order)
    y, final = _dense(gathered, weight, bias, activation, state, starts, mask.sum(1))
    y = y.gather(1, order.argsort(dim=1)[..., None].expand_as(y))
    return torch.where(mask[..., None], y, 0), final


def _dense(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    state: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Rows whose first `lengths` positions are real; None for all of them."""
    batch, seqlen, d = x.shape
    past = weight.shape[1] - 1
    high = torch.float64 if x.dtype == torch.float64 else torch.float32
    full = torch.cat([state, x], 1)  # b past+l d
    first = None
    if starts is not None:
        # Where in `full` the document of each position begins; 0 for one that continues the state.
        at = torch.arange(past, past + seqlen, device=x.device).expand(batch, seqlen)
        first = torch.where(starts, at, 0).cummax(1).values
    wide, w = full.to(high), weight.to(high)
    y = wide[:, past:] * w[:, past]
    for k in range(past):
        tap = wide[:, k : k + seqlen] * w[:, k]
        if first is not None:
            seen = torch.arange(k, k + seqlen, device=x.device) >= first
            tap = torch.where(seen[..., None], tap, 0)
        y = y + tap
    if bias is not None:
        y = y + bias.to(high)
    if activation == "silu":
        y = F.silu(y)

    if lengths is None:
        lengths = torch.full((batch,), seqlen, device=x.device)
    last = lengths[:, None] + torch.arange(past, device=x.device)  # b past
    final = full.gather(1, last[..., None].expand(batch, past, d))
    if first is not None:
        begun = first.gather(1, (lengths - 1).clamp(min=0)[:, None]) * (lengths > 0)[:, None]
        final = torch.where((last >= begun)[..., None], final, 0)
    return y.to(x.dtype), final


def step(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, *, activation: str | None) -> Tensor:
    high = torch.float64 if x.dtype == torch.float64 else torch.float32
    window = torch.cat([state, x[:, None]], 1)
    y = (window.to(high) * weight.to(high).T).sum(1)
    if bias is not None:
        y = y + bias.to(high)
    state.copy_(window[:, 1:])
    return (F.silu(y) if activation == "silu" else y).to(x.dtype)
