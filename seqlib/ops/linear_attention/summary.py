"""The law of linear attention: what a span does to the state, and how two spans do it one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from seqlib.context import undisturbed
from seqlib.ops.decays import decayed, summable
from seqlib.ops.documents import zero_padding
from seqlib.sequence import SequenceInfo

__all__ = ["combine", "mask_padding", "summarize"]


@undisturbed
def summarize(
    k: Tensor, v: Tensor, log_decay: Tensor | None = None, *, seq: SequenceInfo | None = None
) -> tuple[Tensor, Tensor]:
    """What a span does to an incoming state S:  S -> decay S + state.

        decay = exp(sum_t log_decay_t),  0 if a document starts in the span
        state = sum_t exp(sum_{s>t} log_decay_s) k_t^T v_t

    Differentiable. Sequence parallelism gathers these, and `combine` folds them.

    Args:
        k, v, log_decay, seq: as in `linear_attention`.

    Returns:
        decay (batch, nheads, 1) or, for decays per channel, (batch, nheads, d_state), and state
        (batch, nheads, d_state, headdim), both float32 (float64 for float64 inputs).

    Source: Sun et al. 2024 (LASP-2), section 3, with decay.
    """
    high = torch.float64 if v.dtype == torch.float64 else torch.float32
    ids = None if seq is None else seq.document_ids
    if seq is not None and ids is not None:  # what stands before the last document does not matter
        kept = ids == ids[:, -1:]
        seq = SequenceInfo(padding_mask=kept if seq.padding_mask is None else kept & seq.padding_mask)
    k, v, log_decay = mask_padding(k, v, log_decay, seq)
    batch, seqlen, nheads, _ = v.shape
    g = v.new_zeros(nheads, dtype=high) if log_decay is None else log_decay
    if g.dim() < 4:
        g = g.expand(batch, seqlen, nheads).unsqueeze(-1)
    cum = summable(g).cumsum(1)
    left, decay = torch.exp((cum[:, -1:] - cum).to(high)), torch.exp(cum[:, -1].to(high))
    if ids is not None:
        decay = decay.masked_fill((ids[:, -1] > 0)[:, None, None], 0.0)
    k = k.to(high).repeat_interleave(nheads // k.shape[2], 2)
    return decay, torch.einsum("blhn,blhp->bhnp", k * left, v.to(high))


@undisturbed
def combine(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The summary of span a followed by span b. Associative; (1, 0) is its identity.

    (decay_a, state_a) (decay_b, state_b) = (decay_a decay_b, decay_b state_a + state_b)
    """
    return decayed(b[0], a[0]), decayed(b[0].unsqueeze(-1), a[1]) + b[1]


def mask_padding(
    k: Tensor, v: Tensor, log_decay: Tensor | None, seq: SequenceInfo | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Inputs under which padded positions leave the state as it is: nothing added, no decay."""
    if seq is None or seq.padding_mask is None:
        return k, v, log_decay
    if log_decay is not None:
        log_decay = log_decay.expand(*v.shape[:3]) if log_decay.dim() == 1 else log_decay
        log_decay = zero_padding(log_decay, seq)
    return zero_padding(k, seq), zero_padding(v, seq), log_decay
