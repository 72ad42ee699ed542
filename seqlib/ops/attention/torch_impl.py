"""Attention over torch's fused scaled_dot_product_attention, without a (seqlen, seqlen) matrix of any kind.

Padding and packing never reach the kernels as masks: the documents of a batch are cut out, put side by side as rows of
like length and attended one by one. A causal row padded on its right needs no mask at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from seqlib.dispatch import batched, forward_mode
from seqlib.ops.attention.documents import Tokens, documents, with_past
from seqlib.ops.attention.state import KVState, append
from seqlib.ops.derivatives import recomputed
from seqlib.sequence import SequenceInfo

__all__ = ["Rule", "attend", "attention_chunked", "attention_parallel", "softmax_attention"]

# Entries of a mask that may exist at one time, and the narrowest block of queries it may force.
_MASK, _BLOCK = 1 << 19, 64


class Rule(NamedTuple):
    """Who sees whom, in coordinates that count from the first query. Per row, keys lie in begin <= j < end."""

    window: int | None
    causal: bool
    scale: float
    relu: bool
    begin: Tensor | None = None
    end: Tensor | None = None


# (queries, keys, rule) -> y, where the queries belong to the last tokens of the keys.
_Form = Callable[[Tokens, Tokens, Rule], Tensor]


def attention_parallel(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, **options) -> tuple[Tensor, KVState]:
    return attend(_parallel, q, k, v, log_decay, **options)


def attention_chunked(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, **options) -> tuple[Tensor, KVState]:
    return attend(_chunked, q, k, v, log_decay, **options)


def attend(
    form: _Form,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    window: int | None,
    causal: bool,
    scale: float,
    relu: bool,
    state: KVState | None,
    seq: SequenceInfo | None,
) -> tuple[Tensor, KVState]:
    queries: Tokens = (q,)
    keys: Tokens = (k, v)
    sums = None
    if log_decay is not None:
        log_decay = log_decay.double()
        if seq is not None and seq.padding_mask is not None:
            log_decay = torch.where(seq.padding_mask[..., None], log_decay, 0)
        sums = log_decay.cumsum(1)
        queries, keys = (*queries, sums[..., None]), (*keys, sums[..., None])
    final = append(state, k, v, sums, window=window, seq=seq)
    if isinstance(q.shape[1], torch.SymInt) and state is None and (window is not None or seq is not None):
        return _in_one_mask(queries, keys, Rule(window, causal, scale, relu), seq), final
    if seq is None or seq.shape is None:
        known, begin = with_past(state, None, keys, window)
        return form(queries, known, Rule(window, causal, scale, relu, begin)), final
    y = q.new_zeros(q.shape[0] * q.shape[1], q.shape[2], v.shape[3])
    for index, real, rows in documents(seq, has_state=state is not None):
        ours, theirs = (tuple(t.flatten(0, 1)[index] for t in tokens) for tokens in (queries, keys))
        known, begin = with_past(None if rows is None else state, rows, theirs, window)
        end = None if causal else real.sum(1)
        part = form(ours, known, Rule(window, causal, scale, relu, begin, end))
        y = y.index_copy(0, index[real], part[real])
    return y.unflatten(0, q.shape[:2]), final


def _in_one_mask(queries: Tokens, keys: Tokens, rule: Rule, seq: SequenceInfo | None) -> Tensor:
    """Every query and key of an exported program at once: its documents and blocks cannot be counted."""
    (batch, seqlen), device = queries[0].shape[:2], queries[0].device
    seq = seq or SequenceInfo()
    at = seq.positions(batch, seqlen, device)
    away = at[:, :, None] - at[:, None]  # b query key
    visible = away >= 0 if rule.causal else torch.ones_like(away, dtype=torch.bool)
    if rule.window is not None:
        visible = visible & (away.abs() < rule.window)
    document = seq.document_ids
    if document is not None:
        visible = visible & (document[:, :, None] == document[:, None])
    if seq.padding_mask is None:
        return _sdpa(queries, keys, rule, attn_mask=visible[:, None])
    # A padded query is not read, but must see something for its softmax to be a number.
    real = seq.padding_mask[:, :, None]
    visible = (visible & real & seq.padding_mask[:, None]) | (~real & (away == 0))
    y = _sdpa(queries, keys, rule, attn_mask=visible[:, None])
    return y.masked_fill(~seq.padding_mask[..., None, None], 0)


def _parallel(queries: Tokens, keys: Tokens, rule: Rule) -> Tensor:
    """Every query against every key it may see; where that takes a mask, block by block of queries."""
    (batch, seqlen), total, gated = queries[0].shape[:2], keys[0].shape[1], len(queries) > 1
    past = total - seqlen
    window = None if rule.window is None or rule.window >= total else rule.window
    rule = rule._replace(window=window)
    plain = not gated and not rule.relu
    uneven = rule.begin is not None or rule.end is not None
    if not uneven and window is None and (past == 0 or not rule.causal) and (plain or seqlen <= _BLOCK):
        return _sdpa(queries, keys, rule, is_causal=rule.causal)
    # Decays are counted from the first query of a block: in wider ones they would lose digits.
    block = _BLOCK if gated else max(_BLOCK, _MASK // (total * (batch if uneven else 1)))
    parts = []
    for i0 in range(0, seqlen, block):
        i1 = min(seqlen, i0 + block)
        j0 = -past if window is None else max(-past, i0 - window + 1)
        j1 = i1 if rule.causal else min(seqlen, i1 + (window or seqlen) - 1)
        ours, theirs = tuple(t[:, i0:i1] for t in queries), tuple(t[:, past + j0 : past + j1] for t in keys)
        given = ours, theirs, rule, range(i0, i1), range(j0, j1)
        # Each block has its scores or a copy of its keys, and all of them together would be quadratic in memory.
        parts.append(_block(*given) if plain else recomputed(_block, *given))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _block(queries: Tokens, keys: Tokens, rule: Rule, i: range, j: range) -> Tensor:
    return _sdpa(queries, keys, rule, attn_mask=_mask(rule, i, j, queries[0].device))


def _chunked(queries: Tokens, keys: Tokens, rule: Rule) -> Tensor:
    """Causal windows block by block, all at once: a block of queries sees itself and the blocks its window reaches."""
    assert rule.window is not None and rule.causal
    (batch, seqlen), past = queries[0].shape[:2], keys[0].shape[1] - queries[0].shape[1]
    # Narrower blocks see fewer keys in vain, but gradients hold a copy of the keys of each; a quarter of the window
    # does little of either.
    block = max(_BLOCK, rule.window // 4)
    reach = -(-(rule.window - 1) // block)
    first = max(1, reach) * block
    head = _parallel(tuple(t[:, :first] for t in queries), tuple(t[:, : past + first] for t in keys), rule)
    if seqlen <= first:
        return head
    # What came before the first query is out of reach for all further blocks, so they share one mask.
    padding = (0, 0, 0, 0, 0, -seqlen % block)
    queries = tuple(F.pad(t[:, first:], padding) for t in queries)
    keys = tuple(F.pad(t[:, past + first - reach * block :], padding) for t in keys)
    # Overlapping views: each block's keys are read where they lie.
    queries = tuple(t.unflatten(1, (-1, block)).flatten(0, 1) for t in queries)
    keys = tuple(t.unfold(1, (reach + 1) * block, block).movedim(-1, 2).flatten(0, 1) for t in keys)
    rest = _block(queries, keys, rule._replace(begin=None, end=None), range(block), range(-reach * block, block))
    rest = rest.unflatten(0, (batch, -1)).flatten(1, 2)
    return torch.cat([head, rest[:, : seqlen - first]], 1)


def _mask(rule: Rule, queries: range, keys: range, device: torch.device) -> Tensor:
    """(1 or batch, 1, queries, keys) bool: which keys each query may see."""
    i = torch.arange(queries.start, queries.stop, device=device)[:, None]
    j = torch.arange(keys.start, keys.stop, device=device)
    ahead, behind = (1 if rule.causal else rule.window), rule.window
    visible = torch.ones(1, 1, len(queries), len(keys), dtype=torch.bool, device=device)
    if ahead is not None:
        visible = visible & (j - i < ahead)
    if behind is not None:
        visible = visible & (i - j < behind)
    if rule.begin is not None:
        visible = visible & (j >= rule.begin[:, None, None, None])
    if rule.end is not None:
        # A query past the end is never read, but it must see something for its softmax to be a number.
        visible = visible & ((j < rule.end[:, None, None, None]) | (j == i))
    return visible


def _sdpa(queries: Tokens, keys: Tokens, rule: Rule, **options: Any) -> Tensor:
    """torch's fused kernel on (batch, seqlen, nheads, headdim)."""
    scale = rule.scale
    (q, *gate), (k, v, *key_gate) = queries, keys
    dtype, group, width = v.dtype, q.shape[2] // k.shape[2], v.shape[3]
    if group > 1:
        k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    if rule.relu:
        return _rectified(q, k, v, scale, **options)
    if gate:
        q, k, v, scale = (
            *_gated(q, k, gate[0], key_gate[0], scale),
            v.to(torch.promote_types(dtype, torch.float32)),
            1.0,
        )
    # The fused kernels want one head width; without them torch would write out all scores.
    q, k, v = (F.pad(t, (0, max(q.shape[3], width) - t.shape[3])).transpose(1, 2) for t in (q, k, v))
    return softmax_attention(q, k, v, scale=scale, **options).transpose(1, 2)[..., :width].to(dtype)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """torch's scaled_dot_product_attention; by its matrix products where the fused kernels have no rule."""
    if forward_mode() or batched():
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, **options)
    return F.scaled_dot_product_attention(q, k, v, **options)


def _rectified(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, is_causal: bool = False, attn_mask: Tensor | None = None
) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, values = (t.to(wide).transpose(1, 2) for t in (q, k, v))
    weights = (q @ k.transpose(-1, -2) * scale).relu()
    if attn_mask is not None:
        weights = torch.where(attn_mask, weights, 0)
    return ((weights.tril() if is_causal else weights) @ values).transpose(1, 2).to(v.dtype)


def _gated(q: Tensor, k: Tensor, sums: Tensor, key_sums: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Scaled queries and keys with two features more, whose product is sums_i - key_sums_j.

    A bias would be a matrix, and one that wants gradients has no fused kernel. Both are counted from the first query,
    so that rounding is that of the decays within a block.
    """
    first, wide = sums[:, :1], torch.promote_types(q.dtype, torch.float32)
    gate, key_gate = (sums - first).to(wide), (first - key_sums).to(wide)
    q = torch.cat([q.to(wide) * scale, gate, torch.ones_like(gate)], -1)
    return q, torch.cat([k.to(wide), torch.ones_like(key_gate), key_gate], -1)
