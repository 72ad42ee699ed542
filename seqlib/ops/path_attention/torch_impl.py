"""PaTH attention block by block.

Inside a block the product of its maps is I - W^T T W, with T = (I + tril(diag(beta) W W^T, -1))^-1 diag(beta).
So scores within a block, queries brought to its beginning and keys brought to its end are matrix products. Keys of
earlier blocks come to the block of a query through the products of the blocks between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlib.context import undisturbed
from seqlib.errors import UnsupportedInput
from seqlib.ops.attention.state import append
from seqlib.ops.attention.torch_impl import sums_of_last
from seqlib.ops.decays import FORGETS, summable
from seqlib.ops.derivatives import recomputed
from seqlib.ops.documents import documents, take, zero_padding
from seqlib.ops.path_attention.state import PathState
from seqlib.sequence import SequenceInfo

__all__ = [
    "Blocks",
    "Past",
    "attend",
    "block_maps",
    "by_block",
    "by_token",
    "in_blocks",
    "path_attention_chunked",
    "step",
]

CHUNK = 128


class Blocks(NamedTuple):
    """Tokens in blocks, (b, g, c, q, ...). The query heads of one key head stand one after the other: their rows are
    r q. The maps of a block are I - w^T tw."""

    q: Tensor  # brought to the beginning of their block
    k: Tensor  # brought to its end
    v: Tensor
    w: Tensor
    tw: Tensor
    local: Tensor  # b g c (r q) k, scores within a block


class Past(NamedTuple):
    """Keys and values of the state, and which of them are filled. Per head: (b, g, s, ...)."""

    k: Tensor
    v: Tensor
    live: Tensor  # b s
    decay: Tensor | None  # b h s, negative sums


# ((q, k, v, w, beta and maybe the sums of log-decays), past, scale, chunk_size) -> y, the keys brought to the end, and
# those of the past brought there, (batch, seqlen, heads, headdim) each.
_Form = Callable[[tuple[Tensor, ...], Past | None, float, "int | None"], tuple[Tensor, Tensor, "Tensor | None"]]


def path_attention_chunked(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, beta: Tensor, log_decay: Tensor | None, **options: Any
) -> tuple[Tensor, PathState]:
    return attend(_attend, q, k, v, w, beta, log_decay, **options)


def attend(
    form: _Form,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float,
    chunk_size: int | None,
    state: PathState | None,
    seq: SequenceInfo | None,
) -> tuple[Tensor, PathState]:
    high = torch.promote_types(q.dtype, torch.float32)
    inputs: tuple[Tensor, ...] = (q, k, v, w, beta)
    since = None
    if log_decay is not None:
        log_decay = zero_padding(summable(log_decay, FORGETS), seq)
        since = sums_of_last(log_decay, seq)
        inputs = (*inputs, log_decay)

    def run(inputs: tuple[Tensor, ...], past: Past | None) -> tuple[Tensor, Tensor, Tensor | None]:
        return form((*inputs[:5], *(t.cumsum(1) for t in inputs[5:])), past, scale, chunk_size)

    held = None if state is None else state.k.to(high)
    if seq is None or seq.shape is None:
        y, keys, held = run(inputs, _past(state, None))
    else:
        y = q.new_zeros(q.shape[0] * q.shape[1], q.shape[2], v.shape[3])
        keys = k.flatten(0, 1).to(high)
        for group in documents(seq, has_state=state is not None):
            index, real = group.at, group.real
            # What repeats the last token turns no key.
            q_, k_, v_, w_, beta_, *rest = (take(t, index) for t in inputs)
            beta_ = torch.where(real[..., None], beta_, 0)
            part, brought, old = run(
                (q_, k_, v_, w_, beta_, *rest), _past(state, group.rows) if group.goes_on else None
            )
            y = y.index_copy(0, index[real], part[real])
            keys = keys.index_copy(0, index[real], brought[real])
            if held is not None and group.goes_on and old is not None:
                held = held.index_copy(0, group.rows, F.pad(old, (0, 0, 0, 0, 0, held.shape[1] - old.shape[1])))
        y, keys = y.unflatten(0, q.shape[:2]), keys.unflatten(0, q.shape[:2])
    if state is not None and held is not None:
        room = state.capacity - held.shape[1]
        state = PathState(F.pad(held, (0, 0, 0, 0, 0, room)), state.v, state.length, state.log_decay)
    final = append(state, keys, v, since, window=None, seq=seq)
    return y, PathState(final.k, final.v, final.length, final.log_decay)


def _past(state: PathState | None, rows: Tensor | None) -> Past | None:
    """The filled part of the state, of all rows or of some."""
    if state is None or int(state.length.max()) == 0:
        return None
    k, v, length, decay = state.k, state.v, state.length, state.log_decay
    if rows is not None:
        k, v, length = k[rows], v[rows], length[rows]
        decay = None if decay is None else decay[rows]
    filled = int(length.max())
    live = torch.arange(filled, device=k.device) < length[:, None]
    k, v = (t[:, :filled].transpose(1, 2) for t in (k, v))
    return Past(k, v, live, None if decay is None else decay[:, :filled].transpose(1, 2))


def in_blocks(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, beta: Tensor, chunk: int, inverse: Callable[[Tensor, Tensor], Tensor]
) -> Blocks:
    """`inverse` makes (I + tril(diag(beta) W W^T, -1))^-1 from W and beta."""
    nheads, nheads_kv = q.shape[2], k.shape[2]
    high = torch.promote_types(q.dtype, torch.float32)

    def blocks(t: Tensor) -> Tensor:  # b g c q ...
        return by_block(t, chunk).to(high)

    K, V, W, B = blocks(k), blocks(v), blocks(w), blocks(beta)
    Q = blocks(q).unflatten(1, (nheads_kv, -1)).transpose(2, 3).flatten(3, 4)
    WT = W.transpose(-1, -2)
    T = inverse(W, B) * B.unsqueeze(-2)
    below = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
    below = below.repeat(nheads // nheads_kv, 1)
    TW = T @ W
    QW = torch.where(below, Q @ WT, 0)
    TWK = T @ (W @ K.transpose(-1, -2)).tril(-1)
    local = (Q @ K.transpose(-1, -2) - QW @ TWK).masked_fill(~below, -torch.inf)
    return Blocks(Q - QW @ TW, K - TWK.transpose(-1, -2) @ W, V, W, TW, local)


def by_block(t: Tensor, chunk: int) -> Tensor:
    """(b, heads, blocks, chunk, ...) from (b, seqlen, heads, ...), with zeros at the end."""
    t = F.pad(t, (0, 0) * (t.dim() - 2) + (0, -t.shape[1] % chunk))
    return t.unflatten(1, (-1, chunk)).movedim(3, 1)


def by_token(t: Tensor, group: int, seqlen: int) -> Tensor:
    """(b, seqlen, heads, ...) from the blocks of queries (b, g, c, r q, ...)."""
    t = t.unflatten(3, (group, -1)).transpose(2, 3).flatten(1, 2).flatten(2, 3)
    return t.transpose(1, 2)[:, :seqlen]


def _inverse(W: Tensor, B: Tensor) -> Tensor:
    eye = torch.eye(W.shape[-2], dtype=W.dtype, device=W.device)
    system = (B.unsqueeze(-1) * (W @ W.transpose(-1, -2))).tril(-1) + eye
    return torch.linalg.solve_triangular(system, eye, upper=False, unitriangular=True)


def _attend(
    inputs: tuple[Tensor, ...], past: Past | None, scale: float, chunk_size: int | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    q, k, v, w, beta, *sums = inputs
    seqlen, nheads = q.shape[1:3]
    group, high = nheads // k.shape[2], torch.promote_types(q.dtype, torch.float32)
    chunk = min(chunk_size or CHUNK, seqlen)
    Q, K, V, W, TW, local = in_blocks(q, k, v, w, beta, chunk, _inverse)
    maps = block_maps(W, TW)
    G = None if not sums else by_block(sums[0], chunk)  # b h c q

    def rows(a: int) -> Tensor:
        """y of block a: (b, g, r q, p)."""
        here, there = _ways(maps[:, :, :a])
        logits, values = [local[:, :, a]], [V[:, :, a]]
        if a:
            keys = (K[:, :, :a] @ here.transpose(-1, -2)).flatten(2, 3)
            logits.insert(0, Q[:, :, a] @ keys.transpose(-1, -2))
            values.insert(0, V[:, :, :a].flatten(2, 3))
        if past is not None:
            keys = past.k.to(high) @ there.transpose(-1, -2)
            score = Q[:, :, a] @ keys.transpose(-1, -2)
            logits.insert(0, score.masked_fill(~past.live[:, None, None], -torch.inf))
            values.insert(0, past.v.to(high))
        scores = torch.cat(logits, -1) * scale
        if G is not None:
            scores = scores + _decays(G, a, past, group, high)
        return scores.softmax(-1) @ torch.cat(values, 2)

    parts = []
    for a in range(K.shape[2]):
        # A block sees all keys before it; kept for the backward pass of every block they would be quadratic.
        parts.append(recomputed(rows, a))
    y = by_token(torch.stack(parts, 2), group, seqlen)
    here, there = _ways(maps)
    brought = (K @ here.transpose(-1, -2)).flatten(2, 3).transpose(1, 2)
    held = None if past is None else (past.k.to(high) @ there.transpose(-1, -2)).transpose(1, 2)
    return y.to(q.dtype), brought[:, :seqlen], held


def block_maps(W: Tensor, TW: Tensor) -> Tensor:
    """The product of the maps of each block (b, g, c, n, n)."""
    return torch.eye(W.shape[-1], dtype=W.dtype, device=W.device) - W.transpose(-1, -2) @ TW


def _ways(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Products of the maps (b, g, c, p, p) of all blocks after each one, latest first, and of all blocks."""
    way = torch.eye(maps.shape[-1], dtype=maps.dtype, device=maps.device).expand(*maps.shape[:2], -1, -1)
    ways = []
    for one in reversed(maps.unbind(2)):
        ways.append(way)
        way = way @ one
    return torch.stack(ways[::-1], 2) if ways else maps, way


def _decays(G: Tensor, a: int, past: Past | None, group: int, high: torch.dtype) -> Tensor:
    """(b, g, r q, s): the log-decays between the queries of block a and every key up to it."""
    keys = G[:, :, : a + 1].flatten(2, 3)
    if past is not None and past.decay is not None:
        keys = torch.cat([-past.decay.double(), keys], -1)
    both = (G[:, :, a].unsqueeze(-1) - keys.unsqueeze(-2)).to(high)
    return both.unflatten(1, (-1, group)).flatten(2, 3)


@undisturbed
def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    beta: Tensor,
    state: PathState,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
) -> Tensor:
    """One token of `path_attention`, for decoding: rewrites every key of the state and takes up the new one, in place.

        k_j <- k_j - beta (k_j . w) w;   then attention over all keys, the new one included as it is

    Args:
        q: (batch, nheads, headdim).
        k, w: (batch, nheads_kv, headdim), v: (batch, nheads_kv, headdim_v), beta: (batch, nheads_kv).
        state: with a free slot in every row (`reserve` makes room).
        log_decay: (batch, nheads); with a state that holds decays, and only then.
        scale: None is 1/sqrt(headdim).

    Returns:
        (batch, nheads, headdim_v) in the dtype of q. Has no gradient.

    Raises:
        UnsupportedInput: the state does not fit, or on the CPU has no free slot.
    """
    batch, capacity = state.k.shape[:2]
    if not isinstance(state, PathState) or (log_decay is None) != (state.log_decay is None):
        raise UnsupportedInput("step takes a PathState, with decays if log_decay is given and only then")
    filled: int | None = None
    if state.length.device.type == "cpu" and not torch.compiler.is_compiling():
        filled = int(state.length.max()) + 1
        if filled > capacity:
            raise UnsupportedInput(f"the cache holds {capacity} tokens and is full; make room with state.reserve(...)")
    with torch.no_grad():
        rows, high = torch.arange(batch, device=q.device), state.k.dtype
        w = w.to(high)
        keys, values = state.k[:, :filled], state.v[:, :filled]
        along = torch.einsum("bsgp,bgp->bsg", keys, w) * beta.to(high)[:, None]
        keys.addcmul_(along.unsqueeze(-1), w[:, None], value=-1)
        state.k[rows, state.length] = k.to(high)
        state.v[rows, state.length] = v
        if log_decay is not None and state.log_decay is not None:
            old = torch.arange(capacity, device=q.device) < state.length[:, None]
            bounded = log_decay[:, None].to(state.log_decay.dtype).clamp(min=-FORGETS)
            state.log_decay += torch.where(old[..., None], bounded, 0)
            state.log_decay[rows, state.length] = 0
        state.length += 1
        groups = q.to(high).unflatten(1, (k.shape[1], -1)) * (q.shape[-1] ** -0.5 if scale is None else scale)
        scores = groups @ keys.permute(0, 2, 3, 1)  # b g r s
        if state.log_decay is not None:
            scores = scores + state.log_decay[:, :filled].transpose(1, 2).unflatten(1, (k.shape[1], -1))
        live = torch.arange(keys.shape[1], device=q.device) < state.length[:, None]
        weights = scores.masked_fill(~live[:, None, None], -torch.inf).softmax(-1)
        return (weights.to(v.dtype) @ values.transpose(1, 2)).flatten(1, 2).to(q.dtype)
