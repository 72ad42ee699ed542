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

from seqlib.context import batched, forward_mode, transformed
from seqlib.ops.attention.past import Tokens, with_past
from seqlib.ops.attention.state import KVState, append
from seqlib.ops.decays import FORGETS, summable
from seqlib.ops.derivatives import recomputed
from seqlib.ops.documents import documents, take, zero_padding
from seqlib.sequence import SequenceInfo

__all__ = ["Rule", "attend", "attention_chunked", "attention_parallel", "softmax_attention", "sums_of_last"]

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
    inputs: Tokens = (q, k, v)
    since = None
    if log_decay is not None:
        log_decay = zero_padding(summable(log_decay, FORGETS), seq)
        since = sums_of_last(log_decay, seq)
        inputs = (*inputs, log_decay)

    def run(inputs: Tokens, rows: Tensor | None, goes_on: bool, real: Tensor | None) -> Tensor:
        q, k, v, *log_decay = inputs
        sums = tuple(t.cumsum(1)[..., None] for t in log_decay)
        known, begin = with_past(state if goes_on else None, rows, (k, v, *sums), window)
        end = None if causal or real is None else real.sum(1)
        return form((q, *sums), known, Rule(window, causal, scale, relu, begin, end))

    final = append(state, k, v, since, window=window, seq=seq)
    counted = seq is None and not isinstance(q.shape[1], torch.SymInt)
    if torch.compiler.is_exporting() and state is None and (window is not None or seq is not None) and not counted:
        sums = () if log_decay is None else (log_decay.cumsum(1)[..., None],)
        return _in_one_mask((q, *sums), (k, v, *sums), Rule(window, causal, scale, relu), seq), final
    if seq is None or seq.shape is None:
        return run(inputs, None, True, None), final
    y = q.new_zeros(q.shape[0] * q.shape[1], q.shape[2], v.shape[3])
    for group in documents(seq, has_state=state is not None):
        cut = tuple(take(t, group.at) for t in inputs)
        part = run(cut, group.rows, group.goes_on, group.real)
        y = y.index_copy(0, group.at[group.real], part[group.real])
    return y.unflatten(0, q.shape[:2]), final


def sums_of_last(log_decay: Tensor, seq: SequenceInfo | None) -> Tensor:
    """Log-decays of the last document of each row, added up to each token, as `append` takes them."""
    if seq is not None and seq.document_ids is not None:
        before = seq.document_ids != seq.document_ids[:, -1:]
        log_decay = log_decay.masked_fill(before[..., None], 0.0)
    return log_decay.cumsum(1)


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
    group, width = q.shape[2] // k.shape[2], v.shape[3]
    if group > 1:
        k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    if rule.relu:
        return _rectified(q, k, v, scale, **options)
    dtype = v.dtype
    if gate:
        q, k, options = _gated(q, k, gate[0], key_gate[0], scale, **options)
        v, scale = v.to(q.dtype), 1.0
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


def _gated(
    q: Tensor,
    k: Tensor,
    sums: Tensor,
    key_sums: Tensor,
    scale: float,
    *,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Scaled queries and keys, and the log-decays between them as a mask that is added to their scores.

    Differences of sums are taken in float64, lest large decays leave no digits of small ones. A mask that wants
    gradients has no fused kernel, so they come through two features more, whose product is zero.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    plain = transformed() or batched()  # nothing fused runs there, so the mask has its own derivatives
    rows, columns = (sums, key_sums) if plain else (sums.detach(), key_sums.detach())
    between = (rows.transpose(1, 2) - columns.permute(0, 2, 3, 1)).to(wide)
    if is_causal:
        attn_mask = torch.ones(between.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None:
        between = between.masked_fill(~attn_mask, -torch.inf)
    q, k = q.to(wide) * scale, k.to(wide)
    if not plain and torch.is_grad_enabled() and (sums.requires_grad or key_sums.requires_grad):
        gate, key_gate = ((t - t.detach()).to(wide) for t in (sums, key_sums))
        q = torch.cat([q, gate, torch.ones_like(gate)], -1)
        k = torch.cat([k, torch.ones_like(key_gate), -key_gate], -1)
    return q, k, {"attn_mask": between}
