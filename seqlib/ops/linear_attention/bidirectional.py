"""Attention to both sides, from causal attention run once in each direction."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from seqlib.ops.documents import zero_padding
from seqlib.ops.linear_attention.summary import summarize
from seqlib.sequence import SequenceInfo

__all__ = ["bidirectional"]


def bidirectional(
    run: Callable[[Tensor, Tensor, Tensor, Tensor | None, SequenceInfo | None], tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float,
    seq: SequenceInfo | None,
) -> tuple[Tensor, Tensor]:
    """y and the final state of causal=False; `run(q, k, v, log_decay, seq)` is the causal form, scale included."""
    heads = v.shape[2]
    q, k, v = (zero_padding(t, seq) for t in (q, k, v))
    if log_decay is None and (seq is None or seq.starts is None):
        # One sum over the whole row serves every position.
        state = summarize(k, v, seq=seq)[1]
        y = torch.einsum("blhn,bhnp->blhp", q.to(state.dtype).repeat_interleave(heads // q.shape[2], 2), state)
        y = scale * y
    else:
        y, state = run(q, k, v, log_decay, seq)
        y_left = run(q.flip(1), k.flip(1), v.flip(1), log_decay, _flipped(seq))[0].flip(1)
        q, k = (t.to(state.dtype).repeat_interleave(heads // t.shape[2], 2) for t in (q, k))
        own = scale * (q * k).sum(-1, keepdim=True) * v.to(state.dtype)  # counted by both directions
        y = y.to(state.dtype) + y_left.to(state.dtype) - own
    return zero_padding(y, seq).to(v.dtype), state


def _flipped(seq: SequenceInfo | None) -> SequenceInfo | None:
    """The same documents read from right to left."""
    ids = None if seq is None else seq.document_ids
    if seq is None or ids is None:
        return None if seq is None or seq.padding_mask is None else SequenceInfo(padding_mask=seq.padding_mask.flip(1))
    ids = ids.flip(1)
    real = torch.ones_like(ids, dtype=torch.bool) if seq.padding_mask is None else seq.padding_mask.flip(1)
    # Numbers fall from left to right now, so the smallest so far is that of the last real token.
    seen = torch.where(real, ids, ids.max() + 1).cummin(1).values
    before = torch.nn.functional.pad(seen[:, :-1], (1, 0), value=-1)
    return SequenceInfo(starts=real & (ids != before), padding_mask=None if seq.padding_mask is None else real)
