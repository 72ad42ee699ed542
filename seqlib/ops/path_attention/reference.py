"""PaTH attention by its definition: every query walks back over the tokens before it."""

from __future__ import annotations

import torch
from torch import Tensor

from seqlib.ops.attention.state import append
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
    batch, seqlen, nheads, _ = q.shape
    high = torch.promote_types(q.dtype, torch.float32)
    group = nheads // k.shape[2]
    real = torch.ones(batch, seqlen, dtype=torch.bool, device=q.device)
    if seq is not None and seq.padding_mask is not None:
        real = seq.padding_mask
    document = torch.zeros_like(real, dtype=torch.long)
    if seq is not None and seq.document_ids is not None:
        document = seq.document_ids
    w, beta = w.to(high), torch.where(real[..., None], beta.to(high), 0)
    decay = q.new_zeros(batch, seqlen, nheads, dtype=high) if log_decay is None else log_decay.to(high)
    decay = torch.where(real[..., None], decay, 0)

    def heads(t: Tensor) -> Tensor:
        return t.repeat_interleave(group, -2)

    # What has come through the maps on its way back, the decays on that way, and the scores met on it.
    walker, passed = q.to(high), torch.zeros_like(decay)
    scores: list[Tensor] = []
    for j in reversed(range(seqlen)):
        seen = real[:, j, None] & (document == document[:, j, None]) & (torch.arange(seqlen, device=q.device) >= j)
        score = scale * (walker * heads(k[:, j].to(high))[:, None]).sum(-1) + passed
        scores.insert(0, score.masked_fill(~seen[..., None], -torch.inf))
        behind = (torch.arange(seqlen, device=q.device) >= j)[:, None]
        mapped = _mapped(walker, heads(w[:, j])[:, None], beta[:, j].repeat_interleave(group, -1)[:, None])
        walker, passed = torch.where(behind[..., None], mapped, walker), passed + decay[:, j, None] * behind
    values = [*v.unbind(1)]
    if state is not None:
        for slot in reversed(range(state.capacity)):
            seen = (document == 0) & (slot < state.length[:, None])
            score = scale * (walker * heads(state.k[:, slot].to(high))[:, None]).sum(-1) + passed
            if state.log_decay is not None:
                score = score + state.log_decay[:, None, slot].to(high)
            scores.insert(0, score.masked_fill(~seen[..., None], -torch.inf))
        values = [*state.v.unbind(1), *values]
    logits = torch.where(real[..., None, None], torch.stack(scores, -1), 0)  # b l h s
    y = torch.einsum("blhs,bshp->blhp", logits.softmax(-1), heads(torch.stack(values, 1).to(high)))
    y = torch.where(real[..., None, None], y, 0)

    keys = [k[:, :0].to(high)]
    held = None if state is None else state.k.to(high)
    for t in range(seqlen):
        held = None if held is None else _mapped(held, w[:, t, None], beta[:, t, None])
        keys = [_mapped(torch.cat(keys, 1), w[:, t, None], beta[:, t, None]), k[:, t, None].to(high)]
    before = None if held is None or state is None else PathState(held, state.v, state.length, state.log_decay)
    final = append(before, torch.cat(keys, 1), v, None if log_decay is None else decay.cumsum(1), window=None, seq=seq)
    return y.to(q.dtype), PathState(final.k, final.v, final.length, final.log_decay)


def _mapped(x: Tensor, w: Tensor, beta: Tensor) -> Tensor:
    """x H for rows x (..., headdim)."""
    return x - beta[..., None] * (x * w).sum(-1, keepdim=True) * w
