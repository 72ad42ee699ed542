"""Linear attention by its definition."""

from __future__ import annotations

import torch
from torch import Tensor

from seqlib.context import values_seen
from seqlib.errors import UnsupportedInput
from seqlib.ops.documents import zero_padding
from seqlib.sequence import SequenceInfo

__all__ = ["linear_attention"]


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float,
    initial_state: Tensor | None,
    causal: bool,
    chunk_size: int | None,
    seq: SequenceInfo | None,
) -> tuple[Tensor, Tensor]:
    batch, seqlen, nheads, headdim = v.shape
    high = torch.float64 if v.dtype == torch.float64 else torch.float32
    if log_decay is None:
        log_decay = v.new_zeros(nheads, dtype=high)
    if values_seen() and bool((log_decay > 0).any()):
        raise UnsupportedInput(f"log_decay must be at most 0, got a largest value of {float(log_decay.max())}")
    g = log_decay.to(high)
    if g.dim() < 4:
        g = g.expand(batch, seqlen, nheads).unsqueeze(-1)
    g = zero_padding(g, seq) if g.dim() > 1 else g
    q, k = (zero_padding(t.to(high).repeat_interleave(nheads // t.shape[2], 2), seq) for t in (q, k))
    vs = zero_padding(v.to(high), seq)
    real = torch.ones(batch, seqlen, dtype=torch.bool, device=v.device)
    starts = torch.zeros_like(real)
    if seq is not None:
        real = real if seq.padding_mask is None else seq.padding_mask
        starts = starts if seq.starts is None else seq.starts & real

    state = v.new_zeros(batch, nheads, k.shape[-1], headdim, dtype=high)
    if initial_state is not None:
        state = initial_state.to(high)
    ys = []
    for t in range(seqlen):
        kept = torch.where(starts[:, t, None, None, None], torch.zeros_like(state), state)
        new = torch.exp(g[:, t, ..., None]) * kept + k[:, t, ..., None] * vs[:, t, :, None]  # b h n p
        state = torch.where(real[:, t, None, None, None], new, state)
        y = scale * (q[:, t, ..., None] * state).sum(-2)
        ys.append(torch.where(real[:, t, None, None], y, torch.zeros_like(y)))
    y = torch.stack(ys, 1) if causal else scale * _both_ways(q, k, vs, log_decay.to(high), real, starts)
    return y.to(v.dtype), state


def _both_ways(q: Tensor, k: Tensor, v: Tensor, g: Tensor, real: Tensor, starts: Tensor) -> Tensor:
    """Every pair of real tokens of one document, at their distance in real tokens."""
    y, document = torch.zeros_like(v), starts.long().cumsum(1)
    for row, number in {(b, int(n)) for b in range(len(v)) for n in document[b, real[b]]}:
        at = (real[row] & (document[row] == number)).nonzero()[:, 0]
        place = torch.arange(len(at), device=v.device)
        distance = (place[:, None] - place).abs()
        weights = torch.exp(torch.where(distance > 0, g[:, None, None], 0) * distance)  # h l s
        part = torch.einsum("lhn,shn,hls,shp->lhp", q[row, at], k[row, at], weights, v[row, at])
        y = y.index_put((torch.full_like(at, row), at), part)
    return y
