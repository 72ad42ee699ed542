"""Tokens regrouped for attention: documents as rows of their own, and what a state holds in front of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from seqlib.ops.attention.state import KVState, take_rows
from seqlib.sequence import SequenceInfo

__all__ = ["Tokens", "documents", "with_past"]

# What is cut and gathered together: (q,) and (k, v), or with decays (q, sums) and (k, v, sums), where sums are the
# log-decays up to each token, (batch, seqlen, nheads, 1) float64, up to a constant per row.
Tokens = tuple[Tensor, ...]


def documents(seq: SequenceInfo, *, has_state: bool) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Groups of documents of like length: flat indices of their tokens (ndocs, longest), which of them are real (the
    others repeat the last token), and the batch rows whose state they go on from (None: they start afresh)."""
    shape, like = seq.shape, seq.starts if seq.starts is not None else seq.padding_mask
    assert shape is not None and like is not None
    real = seq.padding_mask if seq.padding_mask is not None else torch.ones_like(like)
    starts = seq.starts & real if seq.starts is not None else torch.zeros_like(real)
    row_of = torch.arange(shape[0], device=like.device)[:, None] * (shape[1] + 1)
    token = real.flatten().nonzero()[:, 0]
    number, count = torch.unique_consecutive((starts.long().cumsum(1) + row_of).flatten()[token], return_counts=True)
    first = count.cumsum(0) - count
    continues = (number % (shape[1] + 1) == 0) & has_state
    # Rows of one group differ by less than a factor of two, so less than half of what is computed is padding.
    groups: dict[tuple[bool, int], list[int]] = {}
    for i, (goes_on, n) in enumerate(zip(continues.tolist(), count.tolist())):
        groups.setdefault((goes_on, n.bit_length()), []).append(i)
    for (goes_on, _), members in groups.items():
        chosen = torch.tensor(members, device=like.device)
        lengths = count[chosen, None]
        steps = torch.arange(int(lengths.max()), device=like.device)
        index = token[first[chosen, None] + torch.minimum(steps, lengths - 1)]
        yield index, steps < lengths, number[chosen] // (shape[1] + 1) if goes_on else None


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
