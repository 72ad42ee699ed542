"""The long convolution by its definition: every document on its own, every output a sum over lags."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlib.sequence import SequenceInfo

__all__ = ["long_conv"]


def long_conv(
    x: Tensor,
    kernel: Tensor,
    *,
    D: Tensor | None,
    reverse_kernel: Tensor | None,
    initial_state: Tensor | None,
    seq: SequenceInfo | None,
) -> tuple[Tensor, Tensor | None]:
    batch, seqlen, d = x.shape
    length = kernel.shape[1]
    high = torch.float64 if x.dtype == torch.float64 else torch.float32
    ys, finals = [], []
    for row in range(batch):
        y = torch.zeros(seqlen, d, dtype=high, device=x.device)
        state = x.new_zeros(length - 1, d) if initial_state is None else initial_state[row]
        for at, fresh in _documents(seq, row, seqlen):
            state = state.masked_fill(torch.tensor(fresh, device=x.device), 0)
            index = torch.tensor(at, device=x.device)
            seen = torch.cat([state, x[row, index]])
            u = seen[length - 1 :].to(high)
            windows = seen.to(high).unfold(0, length, 1)  # l d lag, oldest first
            part = torch.einsum("ldj,dj->ld", windows, kernel.to(high).flip(1))
            if reverse_kernel is not None:
                ahead = F.pad(u[1:], (0, 0, 0, reverse_kernel.shape[1]))
                part = part + torch.einsum(
                    "ldj,dj->ld", ahead.unfold(0, reverse_kernel.shape[1], 1), reverse_kernel.to(high)
                )
            if D is not None:
                part = part + D.to(high) * u
            y = y.index_copy(0, index, part)
            state = seen[len(seen) - (length - 1) :]
        ys.append(y)
        finals.append(state)
    return torch.stack(ys).to(x.dtype), None if reverse_kernel is not None else torch.stack(finals)


def _documents(seq: SequenceInfo | None, row: int, seqlen: int) -> Iterator[tuple[list[int], bool]]:
    """The positions of each document of a row, and whether it starts afresh."""
    real = [True] * seqlen if seq is None or seq.padding_mask is None else seq.padding_mask[row].tolist()
    starts = [False] * seqlen if seq is None or seq.starts is None else seq.starts[row].tolist()
    at: list[int] = []
    fresh = False
    for t in range(seqlen):
        if real[t] and starts[t]:
            if at:
                yield at, fresh
            at, fresh = [], True
        if real[t]:
            at.append(t)
    if at:
        yield at, fresh
