"""Attention of one head inside chunks of a document, with scores other than softmax and a bias by distance."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlib.ops.attention import KVState
from seqlib.sequence import SequenceInfo

__all__ = ["SCORES", "chunk_attention", "chunk_attention_step"]

SCORES = ("softmax", "laplace", "relu2")


def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    relative: Callable[[int], Tensor],
    *,
    scores: str,
    chunk_size: int | None,
    causal: bool,
    state: KVState | None,
    seq: SequenceInfo | None,
) -> tuple[Tensor, KVState | None]:
    """Every chunk of every document by itself; chunks are counted from the start of the document.

        y_i = sum_j f(s_ij) v_j over the j of the chunk of i, j <= i if causal
        softmax  s_ij = q_i . k_j / sqrt(d_qk) + b(j - i), f its softmax over j
        laplace  s_ij = q_i . k_j / n_i + b(j - i), f(s) = (1 + erf((s - sqrt(1/2)) sqrt(2 pi))) / 2
        relu2    the same s_ij, f(s) = max(s, 0)^2;  n_i is the number of those j

    Args:
        q, k: (batch, seqlen, d_qk); v: (batch, seqlen, d_v).
        relative: b(1 - count) .. b(count - 1) for a number of positions.
        chunk_size: None for one chunk per document.
        state: keys and values of the chunk that the rows are in; only if causal.

    Returns:
        y (batch, seqlen, d_v), zero at padding, and the state after the last token of each row, if causal.

    Source: Ma et al. 2022 (arXiv 2209.10655), section 3.3; facebookresearch/mega, moving_average_gated_attention.py.
    """
    batch, seqlen = q.shape[:2]
    if seq is None and state is None:
        return _whole_rows(q, k, v, relative, scores, chunk_size, causal)
    before = torch.zeros(batch, dtype=torch.long, device=q.device) if state is None else state.length
    seq = seq or SequenceInfo()
    document = q.new_zeros(batch, seqlen, dtype=torch.long) if seq.document_ids is None else seq.document_ids
    position = seq.positions(batch, seqlen, q.device) + before[:, None] * (document == 0)
    chunk, slot = (position * 0, position) if chunk_size is None else (position // chunk_size, position % chunk_size)

    # Chunks become rows: token i of the real ones stands at (group[i], at[i]).
    real = torch.ones_like(document, dtype=torch.bool) if seq.padding_mask is None else seq.padding_mask
    rows, columns = real.nonzero(as_tuple=True)
    own = torch.stack([rows, document[real], chunk[real]], 1)
    new = F.pad((own[1:] != own[:-1]).any(1), (1, 0), value=len(own) > 0)[: len(own)]
    group, at = new.cumsum(0) - 1, slot[real]
    groups = int(new.sum())
    size = 0 if not groups else int(at.max()) + 1
    queries, keys, values = (t.new_zeros(groups, size, t.shape[-1]).index_put((group, at), t[real]) for t in (q, k, v))
    filled = real.new_zeros(groups, size).index_put((group, at), real.new_ones(()))
    if state is not None:
        heads = new.nonzero()[:, 0]
        continued = heads[at[heads] > 0]  # the only chunks that do not begin at slot 0 are those of the state
        old = torch.arange(size, device=q.device) < at[continued][:, None]
        where = group[continued][:, None].expand_as(old)[old], old.nonzero()[:, 1]
        row = rows[continued][:, None].expand_as(old)[old]
        keys = keys.index_put(where, state.k[row, where[1], 0].to(keys.dtype))
        values = values.index_put(where, state.v[row, where[1], 0].to(values.dtype))
        filled = filled.index_put(where, filled.new_ones(()))

    visible = filled[:, None].expand(-1, size, -1)
    if causal:
        visible = visible & torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    index = torch.arange(size, device=q.device)
    bias = relative(size)[index - index[:, None] + size - 1] if size else q.new_zeros(0, 0)
    found = _attend(queries, keys, values, bias, visible, scores)
    y = torch.zeros_like(v).index_put((rows, columns), found[group, at])
    return y, _state(keys, values, rows, group, at, state, batch, chunk_size) if causal else None


def _whole_rows(
    q: Tensor, k: Tensor, v: Tensor, relative: Callable[[int], Tensor], scores: str, chunk_size: int | None,
    causal: bool,
) -> tuple[Tensor, KVState | None]:  # fmt: skip
    """The same for rows of one document, without a look at any number."""
    batch, seqlen = q.shape[:2]
    size = seqlen if chunk_size is None else min(seqlen, chunk_size)
    count = -(-seqlen // size)
    queries, keys, values = (F.pad(t, (0, 0, 0, count * size - seqlen)).unflatten(1, (count, size)) for t in (q, k, v))
    index = torch.arange(size, device=q.device)
    visible = (torch.arange(count * size, device=q.device) < seqlen).unflatten(0, (count, size))[:, None]
    visible = visible & ((index <= index[:, None]) if causal else torch.ones_like(index, dtype=torch.bool))
    bias = relative(size)[index - index[:, None] + size - 1]
    y = _attend(queries, keys, values, bias, visible, scores).flatten(1, 2)[:, :seqlen]
    if not causal:
        return y, None
    made = KVState.empty(batch, chunk_size or size, 1, k.shape[-1], v.shape[-1], dtype=k.dtype, device=k.device)
    length = seqlen - (count - 1) * size
    room = (0, 0, 0, made.capacity - length)
    last_k, last_v = (F.pad(t[:, seqlen - length :], room)[:, :, None] for t in (k, v))
    return y, KVState(last_k, last_v, torch.full_like(made.length, length))


def chunk_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    relative: Callable[[int], Tensor],
    state: KVState,
    *,
    scores: str,
    chunk_size: int | None,
) -> Tensor:
    """One causal position: q, k (batch, d_qk), v (batch, d_v); **writes into `state`**, which has a free slot."""
    # Looking at lengths makes a GPU wait, and a compiler stop.
    looks = q.device.type == "cpu" and not torch.compiler.is_compiling()
    over = state.length >= (chunk_size or state.capacity + 1)
    if not looks or bool(over.any()):  # a new chunk begins
        for held in (state.k, state.v, state.length):
            held.masked_fill_(over.view(-1, *[1] * (held.dim() - 1)), 0)
    rows = torch.arange(len(q), device=q.device)
    state.k[rows, state.length, 0] = k.to(state.k.dtype)
    state.v[rows, state.length, 0] = v.to(state.v.dtype)
    size = int(state.length.max()) + 1 if looks else state.capacity
    index = torch.arange(size, device=q.device)
    bias = relative(size)[(index - state.length[:, None] + size - 1).clamp(max=2 * size - 2)][:, None]
    visible = (index <= state.length[:, None])[:, None]
    state.length += 1
    return _attend(q[:, None], state.k[:, :size, 0], state.v[:, :size, 0], bias, visible, scores)[:, 0]


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, visible: Tensor, scores: str) -> Tensor:
    s = (q @ k.mT).to(bias.dtype)
    if scores == "softmax":
        s = (s * q.shape[-1] ** -0.5 + bias).masked_fill(~visible, torch.finfo(bias.dtype).min)
        return torch.softmax(s, -1).to(v.dtype) @ v
    s = s / visible.sum(-1, keepdim=True).clamp(min=1) + bias
    weight = F.relu(s).square() if scores == "relu2" else (1 + torch.erf((s - 0.5**0.5) * (2 * math.pi) ** 0.5)) / 2
    return weight.masked_fill(~visible, 0).to(v.dtype) @ v


def _state(
    keys: Tensor, values: Tensor, rows: Tensor, group: Tensor, at: Tensor, old: KVState | None, batch: int,
    chunk_size: int | None,
) -> KVState:  # fmt: skip
    """The last chunk of every row; rows without a real token keep what they had."""
    if old is None:
        old = KVState.empty(batch, 0, 1, keys.shape[-1], values.shape[-1], dtype=keys.dtype, device=keys.device)
    made = old.reserve(chunk_size or max(old.capacity, keys.shape[1]))
    last = torch.full((batch,), -1, device=rows.device).scatter_reduce(
        0, rows, torch.arange(len(rows), device=rows.device), "amax"
    )
    seen = last >= 0
    last = last[seen]
    room = (0, 0, 0, made.capacity - keys.shape[1])
    k, v = (F.pad(t[group[last]], room)[:, :, None].to(made.k.dtype) for t in (keys, values))
    return KVState(
        made.k.index_put((seen,), k), made.v.index_put((seen,), v), made.length.index_put((seen,), at[last] + 1)
    )
