"""Packed and padded rows as dense ones: every document becomes a row of its own, zeros behind it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from seqlib.errors import UnsupportedInput
from seqlib.sequence import SequenceInfo

__all__ = ["by_document"]

Dense = Callable[[Tensor, Tensor | None], Tensor]


class _Document(NamedTuple):
    row: int
    at: Tensor
    """Positions of its real tokens in the row."""
    fresh: bool


def by_document(
    dense: Dense, x: Tensor, past: int, initial_state: Tensor | None, seq: SequenceInfo | None
) -> tuple[Tensor, Tensor]:
    """Run `dense(x, state)` on every document and gather the last `past` inputs of each row.

    Documents are batched by the power of two above their length, so that little is spent on the zeros behind them; a
    convolution, in either direction, does not feel those.
    """
    batch, seqlen, d = x.shape
    if seq is None or seq.shape is None:
        return dense(x, initial_state), _last_inputs(x, past, initial_state)
    if torch.compiler.is_exporting():
        return _without_padding(dense, x, past, initial_state, seq)
    documents = _documents(seq)
    groups: dict[int, list[_Document]] = defaultdict(list)
    for document in documents:
        groups[(len(document.at) - 1).bit_length()].append(document)
    # One row of zeros at the end stands for what is not there.
    flat = torch.cat([x.reshape(batch * seqlen, d), x.new_zeros(1, d)])
    y = torch.zeros_like(flat)
    for group in groups.values():
        index = torch.nn.utils.rnn.pad_sequence(
            [document.row * seqlen + document.at for document in group],
            batch_first=True,
            padding_value=batch * seqlen,
        ).to(x.device)
        part = dense(flat[index], _states(group, initial_state))
        y = y.index_put((index,), part)
    return y[:-1].view(batch, seqlen, d), _final_state(x, past, initial_state, documents)


def _without_padding(
    dense: Dense, x: Tensor, past: int, initial_state: Tensor | None, seq: SequenceInfo
) -> tuple[Tensor, Tensor]:
    """The same for an exported program, which cannot count documents: real tokens move to the front and back."""
    if seq.starts is not None or seq.padding_mask is None or initial_state is not None:
        raise UnsupportedInput("an exported convolution takes padding, but no packed documents and no earlier state")
    (batch, seqlen, d), real = x.shape, seq.padding_mask
    place = real.long().cumsum(1) - 1
    slot = torch.where(real, place, seqlen)[..., None].expand(batch, seqlen, d)
    front = x.new_zeros(batch, seqlen + 1, d).scatter(1, slot, x)[:, :seqlen]
    y = dense(front, None).gather(1, place.clamp(min=0)[..., None].expand(batch, seqlen, d))
    last = real.sum(1)[:, None] + torch.arange(past, device=x.device)
    state = torch.nn.functional.pad(front, (0, 0, past, 0)).gather(1, last[..., None].expand(batch, past, d))
    return y.masked_fill(~real[..., None], 0), state


def _documents(seq: SequenceInfo) -> list[_Document]:
    """In the order of rows; the spans of one document that padding interrupts are joined."""
    spans = seq.spans
    assert spans is not None
    found: list[_Document] = []
    for row, begin, end, fresh in spans.tolist():
        at = torch.arange(begin, end)
        if found and found[-1].row == row and not fresh:
            found[-1] = found[-1]._replace(at=torch.cat([found[-1].at, at]))
        else:
            found.append(_Document(row, at, bool(fresh)))
    return found


def _states(group: list[_Document], initial_state: Tensor | None) -> Tensor | None:
    """The inputs before each document of a group; None where all start afresh."""
    if initial_state is None or all(document.fresh for document in group):
        return None
    rows = torch.tensor([document.row for document in group], device=initial_state.device)
    fresh = torch.tensor([document.fresh for document in group], device=initial_state.device)
    return initial_state[rows].masked_fill(fresh[:, None, None], 0)


def _last_inputs(x: Tensor, past: int, initial_state: Tensor | None) -> Tensor:
    """(batch, past, d), in memory of its own because `step` writes into it."""
    batch, seqlen, d = x.shape
    if seqlen >= past:
        return x[:, seqlen - past :].clone(memory_format=torch.contiguous_format)
    before = x.new_zeros(batch, past - seqlen, d) if initial_state is None else initial_state[:, seqlen:]
    return torch.cat([before, x], 1)


def _final_state(x: Tensor, past: int, initial_state: Tensor | None, documents: list[_Document]) -> Tensor:
    batch, _, d = x.shape
    state = x.new_zeros(batch, past, d) if initial_state is None else initial_state
    known = torch.cat([state, x, x.new_zeros(batch, 1, d)], 1)
    kept = torch.arange(past)
    index = kept.repeat(batch, 1)
    for row, at, fresh in documents:  # the last document of a row overwrites those before it
        before = kept.new_full((past,), known.shape[1] - 1) if fresh else kept
        index[row] = torch.cat([before, past + at])[len(at) :]
    return known.gather(1, index.to(x.device)[..., None].expand(batch, past, d))
