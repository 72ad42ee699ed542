"""Linear attention in torch: all chunks of a segment at once, segments in turn, with the backward pass written out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlib.ops.decays import summable
from seqlib.ops.derivatives import once
from seqlib.ops.documents import by_document, zero_padding
from seqlib.ops.linear_attention.bidirectional import bidirectional
from seqlib.ops.linear_attention.summary import mask_padding
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
    if seq is not None and seq.starts is not None:
        return _packed(q, k, v, log_decay, scale, initial_state, causal, chunk_size, seq)

    def run(
        q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, seq: SequenceInfo | None
    ) -> tuple[Tensor, Tensor]:
        channels = log_decay is not None and log_decay.dim() == 4
        chunk = min(chunk_size or (CHUNK_PER_CHANNEL if channels else CHUNK), v.shape[1])
        k, v, log_decay = mask_padding(k, v, log_decay, seq)
        q = zero_padding(q, seq)  # NaN times a gradient of zero is NaN
        return _Chunked.apply(q, k, v, log_decay, initial_state, scale, chunk)

    if not causal:
        return bidirectional(run, q, k, v, log_decay, scale, seq)
    y, state = run(q, k, v, log_decay, seq)
    return zero_padding(y, seq), state


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    causal: bool,
    chunk_size: int | None,
    seq: SequenceInfo,
) -> tuple[Tensor, Tensor]:
    """Document by document: in a product of matrices zero times what another document left behind may be NaN."""
    constant = log_decay is not None and log_decay.dim() == 1

    def run(
        q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None, seq: SequenceInfo | None
    ) -> tuple[Tensor, Tensor]:
        decay = log_decay if constant else decay
        options: dict[str, Any] = {"causal": causal, "chunk_size": chunk_size, "seq": seq}
        return chunked(q, k, v, decay, scale=scale, initial_state=state, **options)

    final = v.new_zeros(v.shape[0], v.shape[2], k.shape[-1], v.shape[3], dtype=_wide(v))
    final = final if initial_state is None else initial_state.to(final.dtype)
    return by_document(run, (q, k, v, None if constant else log_decay), v, initial_state, final, seq)


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
    alike: bool  # every chunk decays as the first, but for the tail of the last

    def __post_init__(self) -> None:
        self.last = self.cum[..., -1:, :]
        self.q_reach = self._exp(self.cum)  # how much of the incoming state each position sees
        self.k_reach = self._exp(self.last - self.cum)  # how much of each position is left at the end
        passed = self._exp(self.last)
        self.passed = passed.transpose(-1, -2).expand(-1, -1, self.k.shape[2], -1, -1)  # b h c n 1
        self.qs, self.ks = self.q * self.q_reach, self.k * self.k_reach

    def _exp(self, t: Tensor) -> Tensor:
        return t.to(self.q.dtype).exp()

    def weights(self) -> Tensor:
        """b h c i j n: the decay between two positions of a chunk, zero where j is later."""
        cum = self.cum[:, :, :1] if self.alike else self.cum
        pairs = torch.ones(cum.shape[-2], cum.shape[-2], dtype=torch.bool, device=cum.device).tril()
        # Positive differences are never exponentiated.
        return self._exp((cum.unsqueeze(-2) - cum.unsqueeze(-3)).masked_fill(~pairs[..., None], -torch.inf))

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
        return terms.flip(-2).cumsum(-2).flip(-2) + kept


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        initial_state: Tensor | None,
        scale: float,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        high = _wide(v)
        batch, _, nheads, headdim = v.shape
        if initial_state is None:
            state = torch.zeros(batch, nheads, k.shape[-1], headdim, dtype=high, device=v.device)
        else:
            state = initial_state.to(high)
        y, entries = torch.empty_like(v), []
        for begin, end in _segments(v, k.shape[-1], log_decay, chunk):
            entries.append(state)
            out, state = _cut(q, k, v, log_decay, begin, end, chunk).forward(state)
            y[:, begin:end] = _uncut(scale * out, end - begin)
        ctx.save_for_backward(q, k, v, log_decay, *entries)
        ctx.scale, ctx.chunk = scale, chunk
        ctx.state_dtype = None if initial_state is None else initial_state.dtype
        return y, state

    @staticmethod
    @once
    def backward(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, log_decay, *entries = ctx.saved_tensors
        needs_decay = ctx.needs_input_grad[3]
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        dg = torch.zeros_like(log_decay) if needs_decay else None
        spans = list(_segments(v, k.shape[-1], log_decay, ctx.chunk))
        for (begin, end), entry in zip(reversed(spans), reversed(entries)):
            segment = _cut(q, k, v, log_decay, begin, end, ctx.chunk)
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
        return dq, dk, dv, dg, dinitial, None, None


def _wide(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _segments(v: Tensor, d_state: int, log_decay: Tensor | None, chunk: int) -> Iterator[tuple[int, int]]:
    batch, seqlen, nheads, headdim = v.shape
    widest = chunk * d_state if log_decay is not None and log_decay.dim() == 4 else max(chunk, d_state, headdim)
    length = max(1, SEGMENT // (batch * nheads * widest * chunk)) * chunk
    for begin in range(0, seqlen, length):
        yield begin, min(begin + length, seqlen)


def _cut(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, begin: int, end: int, chunk: int) -> _Segment:
    nheads = v.shape[2]
    high = _wide(v)
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
    return _Segment(_blocks(q, chunk), _blocks(k, chunk), _blocks(v, chunk), cum, alike)


def _blocks(t: Tensor, chunk: int) -> Tensor:
    """(b, l, h, d) as (b, h, c, i, d), the tail filled with zeros."""
    tail = -t.shape[1] % chunk
    t = F.pad(t, (0, 0, 0, 0, 0, tail)) if tail else t
    return t.unflatten(1, (-1, chunk)).permute(0, 3, 1, 2, 4).contiguous()


def _uncut(t: Tensor, seqlen: int) -> Tensor:
    return t.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :seqlen]


def _sum_groups(t: Tensor, heads: int) -> Tensor:
    return t.unflatten(2, (heads, -1)).sum(3) if t.shape[2] != heads else t
