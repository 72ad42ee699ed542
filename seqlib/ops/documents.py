"""Documents of packed rows as rows of their own, so that nothing of one reaches another, not even NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from seqlib.sequence import SequenceInfo

__all__ = ["Group", "by_document", "documents", "take", "zero_padding"]


class Group(NamedTuple):
    """Documents of like length."""

    at: Tensor
    """(ndocs, longest), flat positions of their tokens; after its end a document repeats its last token."""
    real: Tensor
    """(ndocs, longest), False at those repetitions."""
    rows: Tensor
    """(ndocs,), the row of the batch that each stands in."""
    goes_on: bool
    """Whether they go on from the states of their rows."""
    last: Tensor
    """(ndocs,), whether each is the last of its row."""


def documents(seq: SequenceInfo, *, has_state: bool) -> Iterator[Group]:
    """The documents of a batch in groups; rows of one group differ by less than a factor of two, so that less than half
    of what is computed is repetition."""
    shape, like = seq.shape, seq.starts if seq.starts is not None else seq.padding_mask
    assert shape is not None and like is not None
    real = seq.padding_mask if seq.padding_mask is not None else torch.ones_like(like)
    starts = seq.starts & real if seq.starts is not None else torch.zeros_like(real)
    row_of = torch.arange(shape[0], device=like.device)[:, None] * (shape[1] + 1)
    token = real.flatten().nonzero()[:, 0]
    number, count = torch.unique_consecutive((starts.long().cumsum(1) + row_of).flatten()[token], return_counts=True)
    first = count.cumsum(0) - count
    continues = (number % (shape[1] + 1) == 0) & has_state
    row = number // (shape[1] + 1)
    last = torch.ones_like(continues)
    last[:-1] = row[:-1] != row[1:]
    groups: dict[tuple[bool, int], list[int]] = {}
    for i, (goes_on, n) in enumerate(zip(continues.tolist(), count.tolist())):
        groups.setdefault((goes_on, n.bit_length()), []).append(i)
    for (goes_on, _), members in groups.items():
        chosen = torch.tensor(members, device=like.device)
        lengths = count[chosen, None]
        steps = torch.arange(int(lengths.max()), device=like.device)
        index = token[first[chosen, None] + torch.minimum(steps, lengths - 1)]
        yield Group(index, steps < lengths, row[chosen], goes_on, last[chosen])


def zero_padding(t: Tensor, seq: SequenceInfo | None) -> Tensor:
    """t (batch, seqlen, ...) with zeros at padded positions, whatever stands there."""
    if seq is None or seq.padding_mask is None:
        return t
    return t.masked_fill(~seq.padding_mask.view(*seq.padding_mask.shape, *[1] * (t.dim() - 2)), 0.0)


def take(t: Tensor, index: Tensor) -> Tensor:
    """The tokens of t (batch, seqlen, ...) at flat positions."""
    return t.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, index.shape)


def by_document(
    run: Callable[..., tuple[Tensor, Tensor]],
    tensors: tuple[Tensor | None, ...],
    like: Tensor,
    initial_state: Tensor | None,
    final: Tensor,
    seq: SequenceInfo,
) -> tuple[Tensor, Tensor]:
    """Run `run(*tensors, initial_state, seq) -> (y, state)` on every document.

    Args:
        tensors: (batch, seqlen, ...) each, or None.
        like: y is made of its shape and dtype, zero at padded positions.
        final: the state of rows without a token; the others take that of their last document.
    """
    y = like.new_zeros(like.shape).flatten(0, 1)
    for group in documents(seq, has_state=initial_state is not None):
        cut = (None if t is None else take(t, group.at) for t in tensors)
        before = initial_state[group.rows] if initial_state is not None and group.goes_on else None
        padded = None if bool(group.real.all()) else SequenceInfo(padding_mask=group.real)
        part, state = run(*cut, before, padded)
        y = y.index_copy(0, group.at[group.real], part[group.real])
        final = final.index_copy(0, group.rows[group.last], state[group.last].to(final.dtype))
    return y.unflatten(0, like.shape[:2]), final
