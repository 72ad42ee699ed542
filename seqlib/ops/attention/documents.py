"""The documents of a batch as rows of like length, for ops that would spend the square of a padded or packed row."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from seqlib.sequence import SequenceInfo

__all__ = ["documents"]


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
