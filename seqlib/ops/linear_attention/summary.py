"""The law of linear attention: what a span does to the state, and how two spans do it one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from seqlib.sequence import SequenceInfo

__all__ = ["combine", "documents", "mask_padding", "summable", "summarize", "zero_padding"]


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
    k, v, log_decay = mask_padding(k, v, log_decay, seq)
    batch, seqlen, nheads, _ = v.shape
    g = v.new_zeros(nheads, dtype=high) if log_decay is None else log_decay
    if g.dim() < 4:
        g = g.expand(batch, seqlen, nheads).unsqueeze(-1)
    cum = summable(g).cumsum(1)
    left, decay = torch.exp((cum[:, -1:] - cum).to(high)), torch.exp(cum[:, -1].to(high))
    ids = documents(seq)
    if ids is not None:
        left = left.masked_fill((ids != ids[:, -1:])[..., None, None], 0.0)
        decay = decay.masked_fill((ids[:, -1] > 0)[:, None, None], 0.0)
    k = k.to(high).repeat_interleave(nheads // k.shape[2], 2)
    return decay, torch.einsum("blhn,blhp->bhnp", k * left, v.to(high))


def combine(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The summary of span a followed by span b. Associative; (1, 0) is its identity.

    (decay_a, state_a) (decay_b, state_b) = (decay_a decay_b, decay_b state_a + state_b)
    """
    return a[0] * b[0], b[0].unsqueeze(-1) * a[1] + b[1]


def summable(log_decay: Tensor) -> Tensor:
    """Log-decays in float64, where differences of large sums keep the small ones. exp(-1000) is already nothing."""
    return log_decay.double().clamp(min=-1000.0)


def mask_padding(
    k: Tensor, v: Tensor, log_decay: Tensor | None, seq: SequenceInfo | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Inputs under which padded positions leave the state as it is: nothing added, no decay."""
    if seq is None or seq.padding_mask is None:
        return k, v, log_decay
    absent = ~seq.padding_mask
    if log_decay is not None:
        log_decay = log_decay.expand(*v.shape[:3]) if log_decay.dim() == 1 else log_decay
        log_decay = log_decay.masked_fill(absent.view(*absent.shape, *[1] * (log_decay.dim() - 2)), 0.0)
    return zero_padding(k, seq), zero_padding(v, seq), log_decay


def zero_padding(t: Tensor, seq: SequenceInfo | None) -> Tensor:
    """t (batch, seqlen, nheads, width) with zeros at padded positions, whatever stands there."""
    absent = None if seq is None or seq.padding_mask is None else ~seq.padding_mask[..., None, None]
    return t if absent is None else t.masked_fill(absent, 0.0)


def documents(seq: SequenceInfo | None) -> Tensor | None:
    """(batch, seqlen) number of the document of each position, 0 being that of the incoming state; None if one."""
    if seq is None or seq.starts is None:
        return None
    starts = seq.starts if seq.padding_mask is None else seq.starts & seq.padding_mask
    return starts.long().cumsum(1)
