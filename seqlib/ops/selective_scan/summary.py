"""The law of the selective scan: what a span does to the state, and how two spans do it one after the other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlib.ops.decays import decayed
from seqlib.sequence import SequenceInfo

__all__ = ["combine", "state_dtype", "summarize"]


def state_dtype(x: Tensor, A: Tensor) -> torch.dtype:
    """The dtype of states: float32, or float64 for float64 inputs; complex for complex A."""
    high = torch.float64 if x.dtype == torch.float64 else torch.float32
    return high.to_complex() if A.is_complex() else high


def summarize(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    seq: SequenceInfo | None = None,
) -> tuple[Tensor, Tensor]:
    """What a span does to an incoming state h:  h -> decay h + state.

        decay = exp(A sum_t delta_t),  0 if a document starts in the span

    Differentiable. Sequence parallelism gathers these, and `combine` folds them.

    Args:
        x, dt, A, B, dt_bias, dt_softplus, seq: as in `selective_scan`.

    Returns:
        decay and state, both (batch, d_inner, d_state) in the dtype of states.

    Source: Gu and Dao 2023 (Mamba), section 3.3.2.
    """
    from seqlib.ops.selective_scan import selective_scan

    _, state = selective_scan(x, dt, A, B, B, dt_bias=dt_bias, dt_softplus=dt_softplus, seq=seq)
    wide = state_dtype(x, A)
    delta = dt.to(wide.to_real())
    delta = delta if dt_bias is None else delta + dt_bias
    delta = F.softplus(delta) if dt_softplus else delta
    real = None if seq is None else seq.padding_mask
    if real is not None:
        delta = delta.masked_fill(~real.unsqueeze(-1), 0.0)
    decay = torch.exp(delta.sum(1).unsqueeze(-1) * A.to(wide))
    if seq is not None and seq.starts is not None:
        forgets = (seq.starts if real is None else seq.starts & real).any(1)
        decay = decay.masked_fill(forgets.view(-1, 1, 1), 0.0)
    return decay, state


def combine(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The summary of the first span followed by the second. Associative; (1, 0) is its identity."""
    return decayed(second[0], first[0]), decayed(second[0], first[1]) + second[1]
