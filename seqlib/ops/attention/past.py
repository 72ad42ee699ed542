"""What a state holds, in front of the keys of a span."""

from __future__ import annotations

import torch
from torch import Tensor

from seqlib.ops.attention.state import KVState, take_rows

__all__ = ["Tokens", "with_past"]

# What is cut and gathered together: (q,) and (k, v), or with decays (q, sums) and (k, v, sums), where sums are the
# log-decays up to each token, (batch, seqlen, nheads, 1) float64, up to a constant per row.
Tokens = tuple[Tensor, ...]


def with_past(
    state: KVState | None, rows: Tensor | None, keys: Tokens, window: int | None
) -> tuple[Tokens, Tensor | None]:
    """Keys with those of the state before them in order, and per row the coordinate that its keys begin at, counted
    from the first query; None when no row is shorter than the others."""
    if state is None:
        return keys, None
    length = state.length if rows is None else state.length[rows]
    shortest, longest = (int(n) for n in torch.stack(length.aminmax()).tolist())
    past = longest if window is None else min(longest, window - 1)
    if past == 0:
        return keys, None
    held: Tokens = (state.k, state.v)
    if state.log_decay is not None:
        held = (*held, -state.log_decay.double()[..., None])
    if window is None and shortest == longest:
        held = tuple(t[:, :past] if rows is None else t[rows, :past] for t in held)
    else:
        slot = (length[:, None] + torch.arange(-past, 0, device=length.device)).clamp(min=0) % state.capacity
        held = tuple(take_rows(t if rows is None else t[rows], slot) for t in held)
    return tuple(torch.cat(pair, 1) for pair in zip(held, keys)), None if shortest >= past else -length
