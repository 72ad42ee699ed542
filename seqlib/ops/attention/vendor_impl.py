"""Attention by flash-attn: dense, windowed, and over documents of any length laid end to end."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlib.ops.attention.state import KVState, append
from seqlib.sequence import SequenceInfo

__all__ = ["attention"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None,
    causal: bool,
    scale: float,
    state: KVState | None,
    seq: SequenceInfo | None,
) -> tuple[Tensor, KVState]:
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    final = append(state, k, v, window=window, seq=seq)
    sides = (-1, -1) if window is None else (window - 1, 0 if causal else window - 1)
    options: dict[str, Any] = {"softmax_scale": scale, "causal": causal, "window_size": sides}
    if seq is None or seq.shape is None:
        return flash_attn_func(q, k, v, **options), final
    token, bounds = _documents(seq)
    longest = int(bounds.diff().max())
    flat_q, flat_k, flat_v = (t.flatten(0, 1)[token] for t in (q, k, v))
    part = flash_attn_varlen_func(flat_q, flat_k, flat_v, bounds, bounds, longest, longest, **options)
    y = q.new_zeros(q.shape[0] * q.shape[1], *part.shape[1:]).index_copy(0, token, part)
    return y.unflatten(0, q.shape[:2]), final


def _documents(seq: SequenceInfo) -> tuple[Tensor, Tensor]:
    """The flat places of all real tokens, and where among them each document begins (int32, with the end)."""
    known = seq.starts if seq.starts is not None else seq.padding_mask
    assert known is not None
    real = torch.ones_like(known) if seq.padding_mask is None else seq.padding_mask
    starts = torch.zeros_like(known) if seq.starts is None else seq.starts
    row = torch.arange(known.shape[0], device=known.device)[:, None] * (known.shape[1] + 1)
    token = real.flatten().nonzero()[:, 0]
    _, lengths = torch.unique_consecutive((starts.long().cumsum(1) + row).flatten()[token], return_counts=True)
    return token, F.pad(lengths.cumsum(0), (1, 0)).int()
