"""Where each token stands in its document, for what turns or decays with the distance."""

from __future__ import annotations

import torch
from torch import Tensor

from seqlib.sequence import SequenceInfo

__all__ = ["advance", "positions"]


def positions(x: Tensor, length: Tensor | None, seq: SequenceInfo | None) -> Tensor:
    """(batch or 1, seqlen) int64: index of each token of x (batch, seqlen, ...) in its document.

    Args:
        length: (batch,) tokens of the document that the span goes on from; None for none.
        seq: documents and padding. Padding is not counted.
    """
    batch, seqlen = x.shape[:2]
    if seq is None or seq.shape is None:
        here = torch.arange(seqlen, device=x.device)[None]
        return here if length is None else here + length[:, None]
    here = seq.positions(batch, seqlen, x.device)
    if length is None:
        return here
    before = length[:, None]
    return here + (before if seq.document_ids is None else before * (seq.document_ids == 0))


def advance(x: Tensor, length: Tensor | None, seq: SequenceInfo | None) -> Tensor:
    """(batch,) int64: tokens of the last document after the span x; arguments as in `positions`."""
    batch, seqlen = x.shape[:2]
    real = torch.ones(batch, seqlen, dtype=torch.long, device=x.device)
    before = real.new_zeros(batch) if length is None else length
    if seq is not None and seq.padding_mask is not None:
        real = seq.padding_mask.long()
    if seq is not None and seq.document_ids is not None:
        last = seq.document_ids[:, -1:]
        real, before = real * (seq.document_ids == last), before.masked_fill(last[:, 0] > 0, 0)
    return before + real.sum(1)
