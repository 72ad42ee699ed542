"""What transformers passes beside the tokens, read as one `SequenceInfo`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlib.context import values_seen
from seqlib.errors import UnsupportedInput
from seqlib.sequence import SequenceInfo, previous_real

__all__ = ["after_tokens", "padding_mask", "sequence_info"]


def sequence_info(
    batch: int,
    seqlen: int,
    seen: int,
    *,
    attention_mask: Any = None,
    position_ids: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
) -> SequenceInfo | None:
    """Documents and padding of a span of `seqlen` new tokens after `seen` earlier ones; None if nothing is special.

    Documents of packed rows come from the first of these that is given:
    - cu_seq_lens_q: (ndocs + 1,) cumulative lengths over a batch of one row;
    - seq_idx: (batch, seqlen) document numbers, negative for padding; numbers at padding say nothing;
    - position_ids: (batch, seqlen), counted from any number; a document starts at position 0, and wherever a position
      is not one more than that of the real token before it, padding between the two counted or not. Positions that
      count up from 0 at padding to a real token begin a document too. A single new token after earlier ones always
      goes on.
    The first document of a span that follows earlier tokens goes on from them, unless its position is 0.

    Args:
        attention_mask: (batch, seqlen) or (batch, seen + seqlen), 1 at real tokens and 0 at padding; or a dict of masks
            by layer type, of which the two-dimensional one counts.

    Raises:
        UnsupportedInput: a four-dimensional mask, one of other numbers, or shapes that do not fit.
    """
    real = padding_mask(batch, seqlen, seen, attention_mask)
    starts: Tensor | None = None
    if cu_seq_lens_q is not None:
        starts = SequenceInfo.from_cu_seqlens(cu_seq_lens_q, continues=True).starts
    elif seq_idx is not None:
        if tuple(seq_idx.shape) != (batch, seqlen):
            raise UnsupportedInput(f"seq_idx must have shape {(batch, seqlen)}, got {tuple(seq_idx.shape)}")
        documents = SequenceInfo.from_seq_ids(seq_idx, continues=True, padding_mask=real)
        starts, real = documents.starts, documents.padding_mask
    elif position_ids is not None and (seqlen > 1 or not seen):
        if tuple(position_ids.shape) not in ((batch, seqlen), (1, seqlen)):
            raise UnsupportedInput(f"position_ids must have shape {(batch, seqlen)}, got {tuple(position_ids.shape)}")
        starts = _starts(position_ids.expand(batch, -1), real, fresh=not seen)
    if starts is not None:
        starts = starts if not values_seen() or bool(starts.any()) else None
    if starts is None and real is None:
        return None
    seq = SequenceInfo(starts=starts, padding_mask=real)
    seq.check(batch, seqlen)
    return seq


def _starts(positions: Tensor, real: Tensor | None, *, fresh: bool) -> Tensor:
    """(batch, seqlen) bool: the real tokens at which documents begin, told by positions; in `fresh` rows not the first
    one, which has nothing to forget."""
    real = torch.ones_like(positions, dtype=torch.bool) if real is None else real
    at = torch.arange(positions.shape[1], device=positions.device)
    before = previous_real(real)
    since = positions - positions.gather(1, before.clamp(min=0))
    jumps = (before >= 0) & (since != 1) & (since != at - before)
    # The positions that count up to a token one by one, those of padding included, begin here.
    breaks = F.pad(positions.diff(dim=1) != 1, (1, 0), value=True)
    first = torch.where(breaks, at, 0).cummax(1).values
    counted = (positions.gather(1, first) == 0) & (first > before)
    starts = real & (jumps | counted | (positions == 0))
    return starts & (before >= 0) if fresh else starts


def padding_mask(batch: int, seqlen: int, seen: int, attention_mask: Any) -> Tensor | None:
    """(batch, seqlen) bool, True at real tokens among the new ones; None if all are real.

    Where numbers cannot be looked at, in a compiled or exported program, a mask is never found to hide nothing, and
    numbers other than 0 and 1 are taken for 1.
    """
    if isinstance(attention_mask, dict):
        masks = [mask for mask in attention_mask.values() if mask is not None]
        attention_mask = next((mask for mask in masks if mask.dim() == 2), masks[0] if masks else None)
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2 or tuple(attention_mask.shape) not in ((batch, seqlen), (batch, seen + seqlen)):
        raise UnsupportedInput(
            f"attention_mask must have shape (batch, seqlen) = {(batch, seqlen)}, with or without the {seen} tokens "
            f"before, got {tuple(attention_mask.shape)}. It marks padding with 0; causality and windows are the "
            "mixers' own, and packed documents are given by position_ids, seq_idx or cu_seq_lens_q"
        )
    real = attention_mask[:, -seqlen:] != 0
    if not values_seen():
        return real
    if bool((real & (attention_mask[:, -seqlen:] != 1)).any()):
        raise UnsupportedInput(
            "attention_mask must be 1 at real tokens and 0 at padding; it holds other numbers. Masks that are added to "
            "scores and numbers of documents are not read (give the latter as seq_idx)"
        )
    return None if bool(torch.all(real)) else real


def after_tokens(labels: Tensor, attention_mask: Any) -> Tensor:
    """Labels with -100 where the position before is padding."""
    batch, seqlen = labels.shape
    width = attention_mask.shape[-1] if isinstance(attention_mask, Tensor) else 0
    real = padding_mask(batch, seqlen, max(0, width - seqlen), attention_mask)
    return labels if real is None else labels.masked_fill(F.pad(~real[:, :-1], (1, 0)), -100)
