"""PaTH attention by its definition: every query walks back over the tokens before it."""

from __future__ import annotations

import torch
from torch import Tensor

from seqlib.ops.attention.reference import walk
from seqlib.ops.attention.state import append
from seqlib.ops.decays import FORGETS
from seqlib.ops.documents import zero_padding
from seqlib.ops.path_attention.state import PathState
from seqlib.sequence import SequenceInfo

__all__ = ["path_attention"]


def path_attention(
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
    decay = q.new_zeros(q.shape[:3], dtype=high) if log_decay is None else log_decay.to(high).clamp(min=-FORGETS)
    y, keys = torch.zeros_like(q[..., :1]).expand(*q.shape[:3], v.shape[3]).clone(), k.to(high)
    held = None if state is None else list(state.k.to(high))
    # Document by document: in a sum zero times what another one left behind may be NaN.
    for b in range(q.shape[0]):
        document, _ = walk(b, q.shape[1], 0, seq)
        for number in sorted({*document} - {-1}):
            at = torch.tensor([i for i, n in enumerate(document) if n == number], device=q.device)
            where = torch.full_like(at, b), at
            past = None if number or state is None else state.reorder(torch.tensor([b]))
            part, brought, old = _alone(*(t[b : b + 1, at] for t in (q, k, v, w, beta, decay)), scale=scale, state=past)
            y, keys = y.index_put(where, part[0]), keys.index_put(where, brought[0])
            if held is not None and old is not None:
                held[b] = old[0]
    since = None
    if log_decay is not None:
        since = zero_padding(decay, seq)
        if seq is not None and seq.document_ids is not None:
            since = since.masked_fill((seq.document_ids != seq.document_ids[:, -1:])[..., None], 0.0)
        since = since.cumsum(1)
    before = None
    if held is not None and state is not None:
        before = PathState(torch.stack(held), state.v, state.length, state.log_decay)
    final = append(before, keys, v, since, window=None, seq=seq)
    return y.to(q.dtype), PathState(final.k, final.v, final.length, final.log_decay)


def _alone(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, beta: Tensor, decay: Tensor, *, scale: float, state: PathState | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y of one document, its keys and those of the state brought to its end."""
    seqlen, nheads = q.shape[1:3]
    high = torch.promote_types(q.dtype, torch.float32)
    group = nheads // k.shape[2]
    w, beta = w.to(high), beta.to(high)

    def heads(t: Tensor) -> Tensor:
        return t.repeat_interleave(group, -2)

    # What has come through the maps on its way back, the decays on that way, and the scores met on it.
    walker, passed = q.to(high), torch.zeros_like(decay)
    scores: list[Tensor] = []
    for j in reversed(range(seqlen)):
        behind = (torch.arange(seqlen, device=q.device) >= j)[:, None]
        score = scale * (walker * heads(k[:, j].to(high))[:, None]).sum(-1) + passed
        scores.insert(0, score.masked_fill(~behind, -torch.inf))
        mapped = _mapped(walker, heads(w[:, j])[:, None], beta[:, j].repeat_interleave(group, -1)[:, None])
        walker = torch.where(behind[..., None], mapped, walker)
        passed = torch.where(behind, passed + decay[:, j, None], passed)
    values = [*v.unbind(1)]
    if state is not None:
        for slot in reversed(range(state.capacity)):
            seen = slot < state.length[:, None]
            score = scale * (walker * heads(state.k[:, slot].to(high))[:, None]).sum(-1) + passed
            if state.log_decay is not None:
                score = score + state.log_decay[:, None, slot].to(high)
            scores.insert(0, score.masked_fill(~seen[..., None], -torch.inf))
        values = [*state.v.unbind(1), *values]
    weights = torch.stack(scores, -1).softmax(-1)  # b l h s
    y = torch.einsum("blhs,bshp->blhp", weights, heads(torch.stack(values, 1).to(high)))

    keys = [k[:, :0].to(high)]
    held = None if state is None else state.k.to(high)
    for t in range(seqlen):
        held = None if held is None else _mapped(held, w[:, t, None], beta[:, t, None])
        keys = [_mapped(torch.cat(keys, 1), w[:, t, None], beta[:, t, None]), k[:, t, None].to(high)]
    return y.to(q.dtype), torch.cat(keys, 1), held


def _mapped(x: Tensor, w: Tensor, beta: Tensor) -> Tensor:
    """x H for rows x (..., headdim)."""
    return x - beta[..., None] * (x * w).sum(-1, keepdim=True) * w
