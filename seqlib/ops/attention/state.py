"""The keys and values that attention carries from span to span."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlib.sequence import SequenceInfo, State

__all__ = ["KVState", "append", "take_rows"]

K = TypeVar("K", bound="KVState")


@dataclass
class KVState(State):
    """Keys and values of the document that each row is in.

    The token at position p of its document lies in slot p, or in slot p % window of a ring when attention is windowed.
    Padding takes no slot and a new document starts again at position 0, so `length` alone says which position every
    slot holds. Free slots hold zeros.

    Args:
        k: (batch, capacity, nheads_kv, headdim), in the dtype of the inputs.
        v: (batch, capacity, nheads_kv, headdim_v).
        length: (batch,) int64, real tokens of the current document so far; beyond capacity only in a ring.
    log_decay: (batch, capacity, nheads), float32 (float64 for float64 inputs): sum of the log-decays of all tokens
        after each one; None where attention has none. Relative to now, so that it is most exact where it matters.
    """

    k: Tensor
    v: Tensor
    length: Tensor
    log_decay: Tensor | None = None

    @classmethod
    def empty(
        cls,
        batch: int,
        capacity: int,
        nheads_kv: int,
        headdim: int,
        headdim_v: int | None = None,
        *,
        nheads_decay: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> KVState:
        """Room for `capacity` tokens and none in it; a windowed layer needs capacity = window, one with decays
        nheads_decay = nheads."""
        shape = (batch, capacity, nheads_kv)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return cls(
            torch.zeros(*shape, headdim, dtype=dtype, device=device),
            torch.zeros(*shape, headdim_v or headdim, dtype=dtype, device=device),
            torch.zeros(batch, dtype=torch.long, device=device),
            torch.zeros(batch, capacity, nheads_decay, dtype=wide, device=device) if nheads_decay else None,
        )

    @property
    def capacity(self) -> int:
        return self.k.shape[1]

    def reserve(self: K, capacity: int) -> K:
        """The same tokens with room for at least `capacity`; not for rings, whose capacity is their window."""
        more = max(0, capacity - self.capacity)
        decay = None if self.log_decay is None else F.pad(self.log_decay, (0, 0, 0, more))
        k, v = (F.pad(t, (0, 0, 0, 0, 0, more)) for t in (self.k, self.v))
        return type(self)(k, v, self.length, decay)


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """x[b, index[b, i]] for x (batch, seqlen, ...) and index (batch, n): whole rows, so a plain copy of memory."""
    batch, seqlen = x.shape[:2]
    flat = index + torch.arange(batch, device=x.device)[:, None] * seqlen
    return x.flatten(0, 1).index_select(0, flat.flatten()).unflatten(0, index.shape)


def append(
    state: KVState | None,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None = None,
    *,
    window: int | None,
    seq: SequenceInfo | None,
) -> KVState:
    """The state after a span: a new one, unless the span is all there is and its k and v can serve as they are.

    decay: (batch, seqlen, nheads), the log-decays summed up to each token of the span.
    """
    batch, seqlen = k.shape[:2]
    plain = seq is None or seq.shape is None
    wide = torch.float64 if k.dtype == torch.float64 else torch.float32
    since = None if decay is None else (decay[:, -1:] - decay).to(wide)
    if state is None and plain and window is None:
        return KVState(k, v, torch.full((batch,), seqlen, device=k.device), since)

    kept = torch.ones(batch, seqlen, dtype=torch.bool, device=k.device)
    before = state.length if state is not None else torch.zeros(batch, dtype=torch.long, device=k.device)
    if seq is not None and seq.padding_mask is not None:
        kept = seq.padding_mask
    if seq is not None and seq.starts is not None:
        document = (seq.starts & kept).long().cumsum(1)
        last = document[:, -1:]
        kept, before = kept & (document == last), before.masked_fill(last[:, 0] > 0, 0)
    position = before[:, None] + kept.long().cumsum(1) - 1
    length = before + kept.sum(1)

    old = state.capacity if state is not None else 0
    capacity = window or _room(old, seqlen, None if state is None else length)
    # Where each slot's content comes from in [old slots, span, one zero]. One slot more takes what is not kept.
    zero = old + seqlen
    source = torch.full((batch, capacity + 1), zero, device=k.device)
    if old:
        slots = torch.arange(old, device=k.device)
        source[:, :old] = torch.where(slots < before[:, None], slots, zero)
    kept = kept & (position >= length[:, None] - capacity)
    slot = torch.where(kept, position % capacity, capacity)
    source.scatter_(1, slot, torch.arange(old, zero, device=k.device).expand(batch, -1))
    source = source[:, :capacity]

    def move(held: Tensor | None, new: Tensor) -> Tensor:
        parts = ([] if held is None else [held]) + [new, new.new_zeros(batch, 1, *new.shape[2:])]
        return take_rows(torch.cat(parts, 1), source)

    if since is not None and decay is not None:
        held = None if state is None or state.log_decay is None else (state.log_decay + decay[:, -1:]).to(wide)
        since = move(held, since)
    return KVState(move(state.k if state else None, k), move(state.v if state else None, v), length, since)


def _room(capacity: int, seqlen: int, length: Tensor | None) -> int:
    """Capacity of a full cache: the span alone, or what there was, at least doubled when that is too small."""
    if length is None:
        return seqlen
    needed = int(length.max())
    return capacity if needed <= capacity else max(needed, 2 * capacity)
