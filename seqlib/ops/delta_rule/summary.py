"""The law of the delta rule: what a span does to the state, and how two spans do it one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from seqlib.context import undisturbed
from seqlib.sequence import SequenceInfo

__all__ = ["combine", "summarize"]


def summarize(
    k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None = None, *, seq: SequenceInfo | None = None
) -> tuple[Tensor, Tensor]:
    """What a span does to an incoming state S:  S -> transition S + state.

        transition = product over t, the last token leftmost, of (I - beta_t k_t k_t^T) diag(exp(log_decay_t));
            0 if a document starts in the span

    A full matrix per head, unlike the decays of other ops: keys turn the state. Differentiable. Sequence parallelism
    gathers these, and `combine` folds them.

    Args:
        k, v, beta, log_decay, seq: as in `delta_rule`.

    Returns:
        transition (batch, nheads, d_state, d_state) and state (batch, nheads, d_state, headdim), both float32 (float64
        for float64 inputs).

    Source: Yang et al. 2024 (DeltaNet, arXiv 2406.06484), section 3.2.
    """
    from seqlib.ops.delta_rule import delta_rule

    batch, _, nheads, headdim = v.shape
    d_state = k.shape[-1]
    # Columns of the state do not see each other: the identity rides beside the values and takes in nothing.
    high = torch.float64 if v.dtype == torch.float64 else torch.float32
    identity = torch.eye(d_state, dtype=high, device=v.device).expand(batch, nheads, d_state, d_state)
    start = torch.cat([v.new_zeros(batch, nheads, d_state, headdim, dtype=high), identity], -1)
    values = torch.cat([v, v.new_zeros(*v.shape[:3], d_state)], -1)
    _, end = delta_rule(k, k, values, beta, log_decay, initial_state=start, seq=seq)
    state, transition = end.split([headdim, d_state], -1)
    return transition, state


@undisturbed
def combine(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The summary of the first span followed by the second. Associative; (I, 0) is its identity.

    (M_1, S_1) (M_2, S_2) = (M_2 M_1, M_2 S_1 + S_2)
    """
    # A product with a transition of zeros forgets infinity and NaN too.
    forgets = (second[0] == 0).all(-1).all(-1)[..., None, None]
    before = (torch.where(t.isfinite() | ~forgets, t, 0) for t in first)
    transition, state = (second[0] @ t for t in before)
    return transition, state + second[1]
