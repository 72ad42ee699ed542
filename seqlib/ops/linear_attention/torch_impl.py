"""Linear attention in torch: all chunks of a segment at once, segments in turn, with the backward pass written out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlib.ops.derivatives import once
from seqlib.ops.linear_attention.bidirectional import bidirectional
from seqlib.ops.linear_attention.summary import documents, mask_padding, summable, zero_padding
from seqlib.sequence import SequenceInfo

__all__ = ["chunked", "parallel", "step"]

CHUNK = 64
CHUNK_PER_CHANNEL = 16  # scores then need chunk * d_state exponentials per token
SEGMENT = 1 << 21  # elements of the largest temporary: what is worked on at once stays near the cache


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float,
    initial_state: Tensor | None,
    causal: bool,
    chunk_size: int | None,
    seq: SequenceInfo | None,
) -> tuple[Tensor, Tensor]:
    def run(
        q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, seq: SequenceInfo | None
    ) -> tuple[Tensor, Tensor]:
        channels = log_decay is not None and log_decay.dim() == 4
        chunk = min(chunk_size or (CHUNK_PER_CHANNEL if channels else CHUNK), v.shape[1])
        k, v, log_decay = mask_padding(k, v, log_decay, seq)
        q = zero_padding(q, seq)  # NaN times a gradient of zero is NaN
        return _Chunked.apply(q, k, v, log_decay, initial_state, documents(seq), scale, chunk)

    if not causal:
        return bidirectional(run, q, k, v, log_decay, scale, seq)
    y, state = run(q, k, v, log_decay, seq)
    return zero_padding(y, seq), state


def parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float,
    initial_state: Tensor | None,
    causal: bool,
    chunk_size: int | None,
    seq: SequenceInfo | None,
) -> tuple[Tensor, Tensor]:
    """One chunk as long as the sequence: all pairs at once, quadratic in time and memory."""
    options = {"scale": scale, "initial_state": initial_state, "causal": causal, "seq": seq}
    return chunked(q, k, v, log_decay, chunk_size=v.shape[1], **options)  # type: ignore[arg-type]


def step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, scale: float) -> Tensor:
    q, k = (t.to(state.dtype).repeat_interleave(v.shape[1] // t.shape[1], 1) for t in (q, k))
    if log_decay is not None:
        decay = log_decay.to(state.dtype).exp()
        state.mul_(decay.unsqueeze(-1) if decay.dim() == 3 else decay[..., None, None])
    state.addcmul_(k.unsqueeze(-1), v.to(state.dtype).unsqueeze(-2))
    return (scale * (q.unsqueeze(-2) @ state).squeeze(-2)).to(v.dtype)


@dataclass
class _Segment:
    """One stretch of the sequence as blocks, batch b, nheads h, nchunks c, chunk i, d_state n, headdim p.

    In cum, n is 1 where the decay does not depend on the channel, and b, h or c where it does not depend on those.
    """

    q: Tensor  # b h c i n
    k: Tensor
    v: Tensor  # b h c i p
    cum: Tensor  # b h c i n: sum of log_decay from the chunk's first position
    ids: Tensor | None  # b 1 c i 1: document of each position
    entry: Tensor | None  # b 1 c 1 1: document that a chunk's incoming state belongs to
    alike: bool  # every chunk decays as the first, but for the tail of the last

    def __post_init__(self) -> None:
        self.last = self.cum[..., -1:, :]
        self.q_reach = self._exp(self.cum)  # how much of the incoming state each position sees
        self.k_reach = self._exp(self.last - self.cum)  # how much of each position is left at the end
        passed = self._exp(self.last)
        if self.ids is not None:
            assert self.entry is not None
            self.q_reach = self.q_reach.masked_fill(self.ids != self.entry, 0.0)
            self.k_reach = self.k_reach.masked_fill(self.ids != self.ids[..., -1:, :], 0.0)
            passed = passed.masked_fill(self.entry != self.ids[..., -1:, :], 0.0)
        self.passed = passed.transpose(-1, -2).expand(-1, -1, self.k.shape[2], -1, -1)  # b h c n 1
        self.qs, self.ks = self.q * self.q_reach, self.k * self.k_reach

    def _exp(self, t: Tensor) -> Tensor:
        return t.to(self.q.dtype).exp()

    def weights(self) -> Tensor:
        """b h c i j n: the decay between two positions of a chunk, zero where j is later or of another document."""
        cum = self.cum[:, :, :1] if self.alike else self.cum
        pairs = torch.ones(cum.shape[-2], cum.shape[-2], dtype=torch.bool, device=cum.device).tril()
        seen = pairs[..., None] if self.ids is None else pairs[..., None] & self.same()
        # Positive differences are never exponentiated.
        return self._exp((cum.unsqueeze(-2) - cum.unsqueeze(-3)).masked_fill(~pairs[..., None], 0.0)) * seen

    def same(self) -> Tensor:
        assert self.ids is not None
        return self.ids.unsqueeze(-2) == self.ids.unsqueeze(-3)  # b 1 c i j 1

    def scores(self, weights: Tensor) -> Tensor:
        if weights.shape[-1] == 1:
            return self.q @ self.k.transpose(-1, -2) * weights.squeeze(-1)
        return ((weights * self.k.unsqueeze(-3)) @ self.q.unsqueeze(-1)).squeeze(-1)

    def scores_backward(self, weights: Tensor, dp: Tensor) -> tuple[Tensor, Tensor]:
        if weights.shape[-1] == 1:
            dp = dp * weights.squeeze(-1)
            return dp @ self.k, dp.transpose(-1, -2) @ self.q
        dq = (dp.unsqueeze(-2) @ (weights * self.k.unsqueeze(-3))).squeeze(-2)
        return dq, (dp.unsqueeze(-1) * weights * self.q.unsqueeze(-2)).sum(-3)

    def states(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """The state that enters each chunk (b h c n p), and the one that leaves the last."""
        added, entries = self.ks.transpose(-1, -2) @ self.v, []
        for passed, new in zip(self.passed.unbind(2), added.unbind(2)):
            entries.append(state)
            state = torch.addcmul(new, passed, state)
        return torch.stack(entries, 2), state

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        entries, state = self.states(state)
        return self.scores(self.weights()) @ self.v + self.qs @ entries, state

    def backward(
        self, dy: Tensor, state: Tensor, dstate: Tensor, needs_decay: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        """Gradients of q, k, v, log_decay and the entering state from those of y and the leaving state."""
        entries, final = self.states(state)
        dentries, dexits = self.qs.transpose(-1, -2) @ dy, []
        for passed, new in zip(reversed(self.passed.unbind(2)), reversed(dentries.unbind(2))):
            dexits.append(dstate)
            dstate = torch.addcmul(new, passed, dstate)
        dexit = torch.stack(dexits[::-1], 2)

        weights = self.weights()
        dq, dk = self.scores_backward(weights, dy @ self.v.transpose(-1, -2))
        dq += self.q_reach * (dy @ entries.transpose(-1, -2))
        dk += self.k_reach * (self.v @ dexit.transpose(-1, -2))
        dv = self.scores(weights).transpose(-1, -2) @ dy + self.ks @ dexit
        if not needs_decay:
            return dq, dk, dv, None, dstate
        exits = torch.cat([entries[:, :, 1:], final.unsqueeze(2)], 2)
        return dq, dk, dv, self._decay_gradient(dq, dk, exits, dexit), dstate

    def _decay_gradient(self, dq: Tensor, dk: Tensor, exits: Tensor, dexit: Tensor) -> Tensor:
        """sum_{s >= t} (q_s dq_s - k_s dk_s) + <exit, dexit>, chunk by chunk so that rounding does not pile up."""
        terms = self.q * dq - self.k * dk  # b h c i n
        kept = (exits * dexit).sum(-1).unsqueeze(-2)  # b h c 1 n
        if self.cum.shape[-1] == 1:
            terms, kept = terms.sum(-1, keepdim=True), kept.sum(-1, keepdim=True)
        if self.ids is None:
            return terms.flip(-2).cumsum(-2).flip(-2) + kept
        later = self.same().squeeze(-1).triu().to(terms.dtype)
        dg = later @ terms + kept * (self.ids == self.ids[..., -1:, :])
        before = torch.cat([self.entry, self.ids[..., :-1, :]], -2)  # type: ignore[list-item]
        return dg * (self.ids == before)  # what a document start forgets does not matter


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        initial_state: Tensor | None,
        ids: Tensor | None,
        scale: float,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        high = torch.float64 if v.dtype == torch.float64 else torch.float32
        batch, _, nheads, headdim = v.shape
        if initial_state is None:
            state = torch.zeros(batch, nheads, k.shape[-1], headdim, dtype=high, device=v.device)
        else:
            state = initial_state.to(high)
        y, entries = torch.empty_like(v), []
        for begin, end in _segments(v, k.shape[-1], log_decay, chunk):
            entries.append(state)
            out, state = _cut(q, k, v, log_decay, ids, begin, end, chunk).forward(state)
            y[:, begin:end] = _uncut(scale * out, end - begin)
        ctx.save_for_backward(q, k, v, log_decay, ids, *entries)
        ctx.scale, ctx.chunk = scale, chunk
        ctx.state_dtype = None if initial_state is None else initial_state.dtype
        return y, state

    @staticmethod
    @once
    def backward(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, log_decay, ids, *entries = ctx.saved_tensors
        needs_decay = ctx.needs_input_grad[3]
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        dg = torch.zeros_like(log_decay) if needs_decay else None
        spans = list(_segments(v, k.shape[-1], log_decay, ctx.chunk))
        for (begin, end), entry in zip(reversed(spans), reversed(entries)):
            segment = _cut(q, k, v, log_decay, ids, begin, end, ctx.chunk)
            given = ctx.scale * _blocks(dy[:, begin:end].to(entry.dtype), ctx.chunk)
            dq_s, dk_s, dv_s, dg_s, dstate = segment.backward(given, entry, dstate, needs_decay)
            dq[:, begin:end] = _sum_groups(_uncut(dq_s, end - begin), q.shape[2])
            dk[:, begin:end] = _sum_groups(_uncut(dk_s, end - begin), k.shape[2])
            dv[:, begin:end] = _uncut(dv_s, end - begin)
            if dg is not None and dg_s is not None:
                dg_s = _uncut(dg_s, end - begin)
                if log_decay.dim() == 1:
                    dg += dg_s.sum((0, 1, 3))
                else:
                    dg[:, begin:end] = dg_s.squeeze(-1) if log_decay.dim() == 3 else dg_s
        dinitial = None if ctx.state_dtype is None else dstate.to(ctx.state_dtype)
        return dq, dk, dv, dg, dinitial, None, None, None


def _segments(v: Tensor, d_state: int, log_decay: Tensor | None, chunk: int) -> Iterator[tuple[int, int]]:
    batch, seqlen, nheads, headdim = v.shape
    widest = chunk * d_state if log_decay is not None and log_decay.dim() == 4 else max(chunk, d_state, headdim)
    length = max(1, SEGMENT // (batch * nheads * widest * chunk)) * chunk
    for begin in range(0, seqlen, length):
        yield begin, min(begin + length, seqlen)


def _cut(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, ids: Tensor | None, begin: int, end: int, chunk: int
) -> _Segment:
    nheads = v.shape[2]
    high = torch.float64 if v.dtype == torch.float64 else torch.float32
    q, k, v = (t[:, begin:end].to(high) for t in (q, k, v))
    q, k = (t.repeat_interleave(nheads // t.shape[2], 2) if t.shape[2] != nheads else t for t in (q, k))
    nchunks = -(-(end - begin) // chunk)
    alike = log_decay is None or log_decay.dim() == 1
    if log_decay is None:
        cum = torch.zeros(1, 1, 1, chunk, 1, dtype=torch.float64, device=v.device)
    elif log_decay.dim() == 1:
        # The tail after the last position does not decay.
        places = torch.arange(1, nchunks * chunk + 1, device=v.device).clamp(max=end - begin).view(nchunks, chunk, 1)
        places = places - torch.arange(0, nchunks * chunk, chunk, device=v.device).view(nchunks, 1, 1)
        cum = (summable(log_decay).view(-1, 1, 1, 1) * places).unsqueeze(0)
    else:
        g = summable(log_decay[:, begin:end])
        cum = _blocks(g if g.dim() == 4 else g.unsqueeze(-1), chunk).cumsum(-2)
    entry = None
    if ids is not None:
        blocks = F.pad(ids[:, begin:end], (0, nchunks * chunk - (end - begin)), value=-1)
        blocks = torch.where(blocks < 0, ids[:, end - 1 : end], blocks).view(-1, 1, nchunks, chunk, 1)
        first = ids[:, begin - 1] if begin else torch.zeros_like(ids[:, 0])
        entry = torch.cat([first.view(-1, 1, 1, 1, 1), blocks[:, :, :-1, -1:]], 2)
        ids = blocks
    return _Segment(_blocks(q, chunk), _blocks(k, chunk), _blocks(v, chunk), cum, ids, entry, alike)


def _blocks(t: Tensor, chunk: int) -> Tensor:
    """(b, l, h, d) as (b, h, c, i, d), the tail filled with zeros."""
    tail = -t.shape[1] % chunk
    t = F.pad(t, (0, 0, 0, 0, 0, tail)) if tail else t
    return t.unflatten(1, (-1, chunk)).permute(0, 3, 1, 2, 4).contiguous()


def _uncut(t: Tensor, seqlen: int) -> Tensor:
    return t.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :seqlen]


def _sum_groups(t: Tensor, heads: int) -> Tensor:
    return t.unflatten(2, (heads, -1)).sum(3) if t.shape[2] != heads else t
