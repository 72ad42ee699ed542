"""Attention by its definition: row by row, the whole score matrix, an explicit softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from seqlib.context import values_seen
from seqlib.errors import UnsupportedInput
from seqlib.ops.attention.state import KVState
from seqlib.ops.decays import FORGETS
from seqlib.sequence import SequenceInfo

__all__ = ["attention", "walk"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    window: int | None,
    causal: bool,
    scale: float,
    relu: bool,
    state: KVState | None,
    seq: SequenceInfo | None,
) -> tuple[Tensor, KVState]:
    batch, seqlen = q.shape[:2]
    if log_decay is not None and values_seen() and bool((log_decay > 0).any()):
        raise UnsupportedInput(f"log_decay must be at most 0, got a largest value of {float(log_decay.max())}")
    capacity = window or (seqlen if state is None else state.capacity)
    rows = []
    for b in range(batch):
        before = 0 if state is None else int(state.length[b])
        past = range(max(0, before - capacity), before)
        document, position = walk(b, seqlen, before, seq)
        # Document 0 goes on from the state; -1 is padding.
        of_key = torch.tensor([0] * len(past) + document, device=q.device)
        at_key = torch.tensor([*past, *position], device=q.device)
        keys, values = k[b], v[b]
        if state is not None:
            slots = [p % state.capacity for p in past]
            keys, values = torch.cat([state.k[b, slots], keys]), torch.cat([state.v[b, slots], values])
        of_query, at_query = of_key[len(past) :, None], at_key[len(past) :, None]
        visible = (of_key == of_query) & (of_query >= 0)
        if causal:
            visible = visible & (at_key <= at_query)
        if window is not None:
            visible = visible & ((at_key - at_query).abs() < window)
        # Document by document: in a sum zero times what another one left behind may be NaN.
        y, since = v.new_zeros(seqlen, q.shape[2], v.shape[3], dtype=q.dtype), None
        latest = max([0, *document])
        for number in range(latest + 1):
            at, seen = ((t == number).nonzero()[:, 0] for t in (of_query[:, 0], of_key))
            decays = None
            if log_decay is not None:
                held = [] if state is None or state.log_decay is None or number else list(state.log_decay[b, slots])
                decays = _decays(log_decay[b, at], held)
                since = decays[-1, :]
            if len(at):
                bias = None if decays is None else decays[1:]
                part = _weighted(q[b, at], keys[seen], values[seen], visible[at][:, seen], scale, bias, relu)
                y = y.index_copy(0, at, part)
        last = (of_key == latest).nonzero()[:, 0]
        rows.append((y, keys[last], values[last], 1 + int(at_key[last[-1]]) if len(last) else 0, since))
    if window is None and state is not None:
        needed = max(length for *_, length, _ in rows)
        capacity = capacity if needed <= capacity else max(needed, 2 * capacity)
    final = KVState(
        torch.stack([_store(keys, length, capacity) for _, keys, _, length, _ in rows]),
        torch.stack([_store(values, length, capacity) for _, _, values, length, _ in rows]),
        torch.tensor([length for *_, length, _ in rows], device=q.device),
        None if log_decay is None else torch.stack([_store(s, n, capacity) for *_, n, s in rows if s is not None]),
    )
    return torch.stack([y for y, *_ in rows]), final


def walk(b: int, seqlen: int, before: int, seq: SequenceInfo | None) -> tuple[list[int], list[int]]:
    """Document and position in it of every token of a row, -1 for padding."""
    documents, positions = [], []
    document, position = 0, before
    for i in range(seqlen):
        real = seq is None or seq.padding_mask is None or bool(seq.padding_mask[b, i])
        if real and seq is not None and seq.starts is not None and bool(seq.starts[b, i]):
            document, position = document + 1, 0
        documents.append(document if real else -1)
        positions.append(position if real else -1)
        position += real
    return documents, positions


def _decays(log_decay: Tensor, held: list[Tensor]) -> Tensor:
    """(1 + queries, keys, nheads): what is forgotten of each key, those that the state holds first, before the first
    query and up to each one."""
    log_decay = log_decay.to(torch.float64 if log_decay.dtype == torch.float64 else torch.float32).clamp(min=-FORGETS)
    up_to = [torch.cat([known[None], known + log_decay.cumsum(0)]) for known in held]
    for j in range(len(log_decay)):
        after = log_decay[j + 1 :].cumsum(0)
        up_to.append(torch.cat([torch.zeros_like(log_decay[:1]).expand(j + 2, -1), after]))
    return torch.stack(up_to, 1) if up_to else log_decay.new_zeros(1, 0, log_decay.shape[1])


def _weighted(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, decays: Tensor | None, relu: bool
) -> Tensor:
    high = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[1] // k.shape[1]
    keys, values = (t.to(high).repeat_interleave(group, 1) for t in (k, v))
    scores = torch.einsum("lhp,shp->hls", q.to(high), keys) * scale
    if decays is not None:
        scores = scores + decays.permute(2, 0, 1)
    if relu:
        weights = torch.where(visible, scores.relu(), 0)
        return torch.einsum("hls,shp->lhp", weights, values).to(q.dtype)
    weights = torch.where(visible, scores, -torch.inf)
    weights = torch.exp(weights - weights.amax(-1, keepdim=True).clamp(min=torch.finfo(high).min))
    total = weights.sum(-1, keepdim=True)
    weights = weights / torch.where(total > 0, total, 1)
    return torch.einsum("hls,shp->lhp", weights, values).to(q.dtype)


def _store(tokens: Tensor, length: int, capacity: int) -> Tensor:
    """What the last tokens of a document, which is `length` long, leave in their slots."""
    buffer = list(tokens.new_zeros(capacity, *tokens.shape[1:]))
    for token, position in zip(tokens, range(length - len(tokens), length)):
        buffer[position % capacity] = token
    return torch.stack(buffer)
