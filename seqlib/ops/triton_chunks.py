"""Triton functions on one chunk of a sequence: tiles, documents, decays, and scores with decays in them.

A chunk has C tokens, n of them real. d_state is N wide and headdim P, in tiles. KIND is the decay: "none", "head"
(constant), "token" or "channel". Exponents are in base 2 and never positive: what could overflow above the diagonal is
clamped, not masked afterwards. DOT is the dtype of matrix operands, PRECISION how float32 operands are multiplied.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "channel_factors",
    "channel_gradients",
    "channel_scores",
    "decay_gradient",
    "documents",
    "dot",
    "factors",
    "load",
    "store",
    "sums",
    "weigh",
]

LOG2E = tl.constexpr(1.4426950408889634)
NOTHING = tl.constexpr(-1000.0)  # exp of it is zero, and finite numbers have no inf - inf
SPREAD = tl.constexpr(115.0)  # log2 of the factors that decays per channel may be split into


@triton.jit
def load(at, i, ni, si, j, nj, sj):
    return tl.load(at + i[:, None] * si + j[None, :] * sj, mask=(i < ni)[:, None] & (j < nj)[None, :], other=0.0)


@triton.jit
def store(at, value, i, ni, si, j, nj):
    tl.store(at + i[:, None] * si + j[None, :], value, mask=(i < ni)[:, None] & (j < nj)[None, :])


@triton.jit
def dot(a, b, DOT: tl.constexpr, PRECISION: tl.constexpr):
    return tl.dot(a.to(DOT), b.to(DOT), input_precision=PRECISION)


@triton.jit
def documents(ids, before, at, n, C: tl.constexpr, PACKED: tl.constexpr):
    """The document of each token of a chunk, that of the state which enters it and that of the state which leaves."""
    if PACKED:
        return tl.load(ids + at + tl.minimum(tl.arange(0, C), n - 1)), tl.load(before + at), tl.load(ids + at + n - 1)
    else:
        return tl.zeros([C], tl.int32), 0, 0


@triton.jit
def sums(g, at, stride, n, C: tl.constexpr, KIND: tl.constexpr):
    """Log-decay from the start of the chunk to each token, and through the chunk. In float64, where differences of
    large sums keep the small ones."""
    i = tl.arange(0, C)
    if KIND == "token":
        x = tl.load(g + at + i * stride, mask=i < n, other=0.0).to(tl.float64)
        x = tl.where(x < NOTHING, NOTHING, x) * LOG2E
        return tl.cumsum(x, 0), tl.sum(x, 0)
    elif KIND == "head":
        x = tl.load(g + at).to(tl.float64)
        x = tl.where(x < NOTHING, NOTHING, x) * LOG2E
        return x * tl.minimum(i + 1, n), x * n
    else:
        x = tl.zeros([C], tl.float64)
        return x, tl.sum(x, 0)


@triton.jit
def factors(cs, total, here, entry, last, PACKED: tl.constexpr):
    """How much of the entering state each token sees, how much of each token is left, what passes the chunk."""
    reach, left, passed = (
        tl.exp2(cs.to(tl.float32)),
        tl.exp2((total - cs).to(tl.float32)),
        tl.exp2(total.to(tl.float32)),
    )
    if PACKED:
        reach = tl.where(here == entry, reach, 0.0)
        left = tl.where(here == last, left, 0.0)
        passed = tl.where(entry == last, passed, 0.0)
    return reach, left, passed


@triton.jit
def weigh(scores, cs, here, KIND: tl.constexpr, PACKED: tl.constexpr, C: tl.constexpr, TURNED: tl.constexpr):
    """Scores with their decay, zero where the key is later or of another document. TURNED: rows are keys."""
    i = tl.arange(0, C)
    seen = i[None, :] >= i[:, None] if TURNED else i[:, None] >= i[None, :]
    if PACKED:
        seen = seen & (here[:, None] == here[None, :])
    if KIND == "token" or KIND == "head":
        # A difference of two sums in float64, at the price of float32.
        high = cs.to(tl.float32)
        low = (cs - high.to(tl.float64)).to(tl.float32)
        away = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
        scores *= tl.exp2(tl.minimum(-away if TURNED else away, 0.0))
    return tl.where(seen, scores, 0.0)


@triton.jit
def logs(g, t, n, st, j, N, TURNED: tl.constexpr):
    """Log-decays per channel: [tokens, channels], TURNED the other way round."""
    x = (load(g, j, N, 1, t, n, st) if TURNED else load(g, t, n, st, j, N, 1)).to(tl.float32)
    return tl.where(x < NOTHING, NOTHING, x) * LOG2E


@triton.jit
def channel_factors(g, t, n, st, j, N, here, entry, last, PACKED: tl.constexpr, TURNED: tl.constexpr):
    """As `factors`. What is left of a token is summed from what follows it: nothing is subtracted."""
    axis: tl.constexpr = 1 if TURNED else 0
    x, after = logs(g, t, n, st, j, N, TURNED), logs(g + st, t, n - 1, st, j, N, TURNED)
    reach, left = tl.exp2(tl.cumsum(x, axis)), tl.exp2(tl.cumsum(after, axis, reverse=True))
    passed = tl.exp2(tl.sum(x, axis))
    if PACKED:
        reach = tl.where(tl.expand_dims(here == entry, 1 - axis), reach, 0.0)
        left = tl.where(tl.expand_dims(here == last, 1 - axis), left, 0.0)
        passed = tl.where(entry == last, passed, 0.0)
    return reach, left, passed


@triton.jit
def from_middle(g, t, n, st, j, N, C: tl.constexpr, TURNED: tl.constexpr):
    """Log-decay from the middle of the chunk to each token, negative before it; and the whole chunk's."""
    axis: tl.constexpr = 1 if TURNED else 0
    x = logs(g, t, n, st, j, N, TURNED)
    cs = tl.cumsum(x, axis)
    middle = tl.sum(tl.where(tl.expand_dims(t == C // 2, 1 - axis), cs, 0.0), axis)
    return cs - tl.expand_dims(middle, axis), tl.min(tl.min(cs, 1), 0)


@triton.jit
def since(g, t, n, st, j, N, start):
    """Decay from token `start` to each later one, summed from there."""
    x = logs(g, t, n, st, j, N, False)
    return tl.exp2(tl.cumsum(tl.where((t > start)[:, None], x, 0.0), 0))


@triton.jit
def channel_scores(
    q, k, g, n, sq, sk, sg, j, N, C: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, TURNED: tl.constexpr
):
    """sum_n q_tn k_sn exp(decay from s to t) of a chunk, [queries, keys], TURNED the other way round; what stands at
    later keys is not to be used. Weak decays split into a factor of t and one of s, strong ones are taken by pairs."""
    t = tl.arange(0, C)
    q_from, spread = from_middle(g, t, n, sg, j, N, C, TURNED)
    k_from, _ = from_middle(g, t, n, sg, j, N, C, not TURNED)
    scores = tl.zeros([C, C], tl.float32)
    if spread > -SPREAD:
        if TURNED:
            turned_q = load(q, j, N, 1, t, n, sq).to(tl.float32) * tl.exp2(q_from)
            scores = dot(load(k, t, n, sk, j, N, 1).to(tl.float32) * tl.exp2(-k_from), turned_q, DOT, PRECISION)
        else:
            turned_k = load(k, j, N, 1, t, n, sk).to(tl.float32) * tl.exp2(-k_from)
            scores = dot(load(q, t, n, sq, j, N, 1).to(tl.float32) * tl.exp2(q_from), turned_k, DOT, PRECISION)
    else:
        queries = load(q, t, n, sq, j, N, 1).to(tl.float32)
        for s in range(0, n):
            key = tl.load(k + s * sk + j, mask=j < N, other=0.0).to(tl.float32)
            column = tl.sum(queries * key[None, :] * since(g, t, n, sg, j, N, s), 1)
            if TURNED:
                scores = tl.where((t == s)[:, None], column[None, :], scores)
            else:
                scores = tl.where((t == s)[None, :], column[:, None], scores)
    return scores


@triton.jit
def channel_gradients(
    a, at, q, k, g, n, sq, sk, sg, j, N, C: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr
):
    """Gradients of queries and keys of a chunk from those of the scores, a [queries, keys] and at, its transpose."""
    t = tl.arange(0, C)
    away, spread = from_middle(g, t, n, sg, j, N, C, False)
    queries, keys = load(q, t, n, sq, j, N, 1).to(tl.float32), load(k, t, n, sk, j, N, 1).to(tl.float32)
    dq, dk = tl.zeros([C, BN], tl.float32), tl.zeros([C, BN], tl.float32)
    if spread > -SPREAD:
        rise, fall = tl.exp2(away), tl.exp2(-away)
        dq = rise * dot(a, keys * fall, DOT, PRECISION)
        dk = fall * dot(at, queries * rise, DOT, PRECISION)
    else:
        for s in range(0, n):
            key = tl.load(k + s * sk + j, mask=j < N, other=0.0).to(tl.float32)
            column = tl.sum(tl.where((t == s)[None, :], a, 0.0), 1)
            row = tl.sum(tl.where((t == s)[:, None], at, 0.0), 0)
            decay = since(g, t, n, sg, j, N, s)
            dq += column[:, None] * decay * key[None, :]
            dk = tl.where((t == s)[:, None], tl.sum(row[:, None] * decay * queries, 0)[None, :], dk)
    return dq, dk


@triton.jit
def decay_gradient(
    dg, terms, kept, here, last, before, at, token, nheads, n, j, N, C: tl.constexpr, KIND: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Store the gradient of log_decay of a chunk and tile of channels, one value per tile unless KIND is "channel".

    It is sum_{s >= t} terms_s + kept, with terms = q dq - k dk and kept = <state, dstate> at the end of the chunk. Sums
    stay inside chunks, so that rounding does not pile up over the sequence.
    """
    i = tl.arange(0, C)
    later = i[None, :] >= i[:, None]
    stays, goes_on = i < n, i < n
    if PACKED:
        later = later & (here[None, :] == here[:, None])
        stays = here == last
        goes_on = here == tl.load(before + at + i, mask=i < n, other=0)  # what a document start forgets does not matter
    if KIND == "channel":
        grad = tl.dot(tl.where(later, 1.0, 0.0), terms, input_precision="tf32x3")
        grad += tl.where(stays[:, None], kept[None, :], 0.0)
        store(dg + token * N, tl.where(goes_on[:, None], grad, 0.0), i, n, nheads * N, j, N)
    else:
        grad = tl.sum(tl.where(later, tl.sum(terms, 1)[None, :], 0.0), 1) + tl.where(stays, tl.sum(kept, 0), 0.0)
        place = dg + (token + i * nheads) * tl.num_programs(1) + tl.program_id(1)
        tl.store(place, tl.where(goes_on, grad, 0.0), mask=i < n)
