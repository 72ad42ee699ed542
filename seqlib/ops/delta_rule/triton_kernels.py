"""Triton kernels of the delta rule in chunks.

With S the state that enters a chunk, r how much of it each token sees and l how much of each token is left at the end,
the corrections U solve a triangular system, and what follows is linear attention with U in the place of V:

    U = T beta (V - r K S),   T = (I + A)^-1,   A = beta tril(K K^T * decay, -1),   S <- passed S + (l K)^T U

Backward, with dU from the outputs and the leaving state: X = T^T dU is the gradient of beta (V - r K S), and everything
else is products with X, as linear attention's are with dy. T is found for all chunks at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from seqlib.ops.triton_chunks import (
    channel_factors,
    channel_gradients,
    channel_scores,
    decay_gradient,
    documents,
    dot,
    factors,
    load,
    store,
    sums,
    weigh,
)

__all__ = ["adjoints", "corrections", "gradients", "inverses"]


@triton.jit
def _rates(beta, at, stride, n, C: tl.constexpr):
    i = tl.arange(0, C)
    return tl.load(beta + at + i * stride, mask=i < n, other=0.0).to(tl.float32)


@triton.jit
def inverses(
    k, beta, g, ids, before, out,
    skb, skl, skh, sbb, sbl, sbh, sgb, sgl, sgh, sib, seqlen, nheads, heads_per_k,
    N: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, C: tl.constexpr, KIND: tl.constexpr,
    PACKED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, FINE: tl.constexpr, FINE_PRECISION: tl.constexpr,
):  # fmt: skip
    """T of every chunk: blocks of one token, then of twice as many, T21 = -T22 A21 T11. Powers of A would be fewer
    steps and lose all digits where keys are alike."""
    nchunks = tl.cdiv(seqlen, C)
    c, row = tl.program_id(0) % nchunks, (tl.program_id(0) // nchunks).to(tl.int64)
    b, h = row // nheads, row % nheads
    i = tl.arange(0, C)
    n = tl.minimum(seqlen - c * C, C)
    t0 = c.to(tl.int64) * C
    k += b * skb + h // heads_per_k * skh + t0 * skl
    here, _, _ = documents(ids, before, b * sib + t0, n, C, PACKED)
    gates = b * sgb + h * sgh + t0 * sgl
    a = tl.zeros([C, C], tl.float32)
    for n0 in range(0, N, BN):
        j = tl.arange(0, BN) + n0
        if KIND == "channel":
            a += channel_scores(k, k, g + gates, n, skl, skl, sgl, j, N, C, FINE, FINE_PRECISION, False)
        else:
            keys = load(k, i, n, skl, j, N, 1)
            a += dot(keys, tl.trans(keys), DOT, PRECISION)
    if KIND == "token":
        cs, _ = sums(g, gates, sgl, n, C, KIND)
        a = weigh(a, cs, here, KIND, PACKED, C, False)
    else:
        a = weigh(a, 0, here, KIND, PACKED, C, False)
    later, earlier = i[:, None], i[None, :]
    a *= _rates(beta, b * sbb + h * sbh + t0 * sbl, sbl, n, C)[:, None]
    t = tl.where(later == earlier, 1.0, 0.0)
    t -= tl.where((later // 2 == earlier // 2) & (later > earlier), a, 0.0)
    for level in tl.static_range(1, 6):
        size = 2**level
        if size < C:
            joins = (later // (2 * size) == earlier // (2 * size)) & (later // size > earlier // size)
            below = tl.dot(tl.where(joins, a, 0.0), t, input_precision="tf32x3")
            t -= tl.dot(t, below, input_precision="tf32x3")
    tl.store(out + (row * nchunks + c) * C * C + later * C + earlier, t)


@triton.jit
def corrections(
    k, v, beta, g, ids, before, inverse, carry, entries, u, final,
    skb, skl, skh, svb, svl, svh, sbb, sbl, sbh, sgb, sgl, sgh, sib, seqlen, nheads, heads_per_k,
    N: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, C: tl.constexpr, KIND: tl.constexpr,
    PACKED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, FINE: tl.constexpr, FINE_PRECISION: tl.constexpr,
):  # fmt: skip
    """U and the state that enters each chunk, chunk after chunk. BN covers all of d_state."""
    row = tl.program_id(0).to(tl.int64)
    b, h = row // nheads, row % nheads
    i, j, p = tl.arange(0, C), tl.arange(0, BN), tl.arange(0, BP) + tl.program_id(1) * BP
    square = i[:, None] * C + i[None, :]
    k += b * skb + h // heads_per_k * skh
    v += b * svb + h * svh
    u += (b * seqlen * nheads + h) * P
    nchunks = tl.cdiv(seqlen, C)
    state = tl.zeros([BN, BP], tl.float32)
    if carry is not None:
        state = load(carry + row * N * P, j, N, P, p, P, 1)
    for c in range(0, nchunks):
        n = tl.minimum(seqlen - c * C, C)
        t0 = tl.cast(c, tl.int64) * C
        store(entries + (row * nchunks + c) * N * P, state, j, N, P, p, P)
        here, entry, last = documents(ids, before, b * sib + t0, n, C, PACKED)
        gates = b * sgb + h * sgh + t0 * sgl
        keys, turned = load(k + t0 * skl, i, n, skl, j, N, 1), load(k + t0 * skl, j, N, 1, i, n, skl)
        rates = _rates(beta, b * sbb + h * sbh + t0 * sbl, sbl, n, C)
        error = load(v + t0 * svl, i, n, svl, p, P, 1).to(tl.float32)
        inverse_t = tl.load(inverse + (row * nchunks + c) * C * C + square)
        if KIND == "channel":
            reach, _, passed = channel_factors(g + gates, i, n, sgl, j, N, here, entry, last, PACKED, False)
            _, left, _ = channel_factors(g + gates, i, n, sgl, j, N, here, entry, last, PACKED, True)
            error -= dot(keys.to(tl.float32) * reach, state, DOT, PRECISION)
            new = dot(inverse_t, error * rates[:, None], FINE, FINE_PRECISION)
            state = state * passed[:, None] + dot(turned.to(tl.float32) * left, new, DOT, PRECISION)
        else:
            cs, total = sums(g, gates, sgl, n, C, KIND)
            reach, left, passed = factors(cs, total, here, entry, last, PACKED)
            error -= dot(keys, state, DOT, PRECISION) * reach[:, None]
            new = dot(inverse_t, error * rates[:, None], FINE, FINE_PRECISION)
            state = state * passed + dot(turned, new * left[:, None], DOT, PRECISION)
        store(u + t0 * nheads * P, new, i, n, nheads * P, p, P)
    store(final + row * N * P, state, j, N, P, p, P)


@triton.jit
def adjoints(
    q, k, dy, beta, g, ids, before, inverse, carry, exits, x, dv, initial,
    sqb, sql, sqh, skb, skl, skh, sdb, sdl, sdh, sbb, sbl, sbh, sgb, sgl, sgh, sib,
    rows, seqlen, nheads, heads_per_q, heads_per_k, scale,
    N: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, C: tl.constexpr, KIND: tl.constexpr,
    PACKED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, FINE: tl.constexpr, FINE_PRECISION: tl.constexpr,
):  # fmt: skip
    """X, the gradient of v and that of the state which leaves each chunk, from the last chunk to the first. Comes with
    the part of dU that is due to y in x."""
    row = tl.program_id(0).to(tl.int64)
    b, h = row // nheads, row % nheads
    i, j, p = tl.arange(0, C), tl.arange(0, BN), tl.arange(0, BP) + tl.program_id(1) * BP
    square = i[:, None] + i[None, :] * C
    q += b * sqb + h // heads_per_q * sqh
    k += b * skb + h // heads_per_k * skh
    dy += b * sdb + h * sdh
    x += (b * seqlen * nheads + h) * P
    dv += (b * rows * nheads + h) * P
    nchunks = tl.cdiv(seqlen, C)
    dstate = tl.zeros([BN, BP], tl.float32)
    if carry is not None:
        dstate = load(carry + row * N * P, j, N, P, p, P, 1)
    for step in range(0, nchunks):
        c = nchunks - 1 - step
        n = tl.minimum(seqlen - c * C, C)
        t0 = tl.cast(c, tl.int64) * C
        store(exits + (row * nchunks + c) * N * P, dstate, j, N, P, p, P)
        here, entry, last = documents(ids, before, b * sib + t0, n, C, PACKED)
        gates = b * sgb + h * sgh + t0 * sgl
        keys, turned_k = load(k + t0 * skl, i, n, skl, j, N, 1), load(k + t0 * skl, j, N, 1, i, n, skl)
        turned_q = load(q + t0 * sql, j, N, 1, i, n, sql)
        rates = _rates(beta, b * sbb + h * sbh + t0 * sbl, sbl, n, C)
        given = load(dy + t0 * sdl, i, n, sdl, p, P, 1)
        inverse_t = tl.load(inverse + (row * nchunks + c) * C * C + square)
        du = load(x + t0 * nheads * P, i, n, nheads * P, p, P, 1).to(tl.float32)
        if KIND == "channel":
            reach, _, passed = channel_factors(g + gates, i, n, sgl, j, N, here, entry, last, PACKED, True)
            _, left, _ = channel_factors(g + gates, i, n, sgl, j, N, here, entry, last, PACKED, False)
            du += dot(keys.to(tl.float32) * left, dstate, DOT, PRECISION)
            new = dot(inverse_t, du, FINE, FINE_PRECISION)
            dstate *= passed[:, None]
            dstate += dot(turned_q.to(tl.float32) * reach * scale, given, DOT, PRECISION)
            dstate -= dot(turned_k.to(tl.float32) * reach, new * rates[:, None], DOT, PRECISION)
        else:
            cs, total = sums(g, gates, sgl, n, C, KIND)
            reach, left, passed = factors(cs, total, here, entry, last, PACKED)
            du += dot(keys, dstate, DOT, PRECISION) * left[:, None]
            new = dot(inverse_t, du, FINE, FINE_PRECISION)
            dstate *= passed
            dstate += dot(turned_q, given.to(tl.float32) * (reach * scale)[:, None], DOT, PRECISION)
            dstate -= dot(turned_k, new * (reach * rates)[:, None], DOT, PRECISION)
        store(x + t0 * nheads * P, new, i, n, nheads * P, p, P)
        store(dv + t0 * nheads * P, new * rates[:, None], i, n, nheads * P, p, P)
    store(initial + row * N * P, dstate, j, N, P, p, P)


@triton.jit
def gradients(
    q, k, v, dy, beta, g, ids, before, u, x, entries, exits, dq, dk, dbeta, dg,
    sqb, sql, sqh, skb, skl, skh, svb, svl, svh, sdb, sdl, sdh, sbb, sbl, sbh, sgb, sgl, sgh, sib,
    rows, seqlen, nheads, heads_per_q, heads_per_k, scale,
    N: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, C: tl.constexpr, KIND: tl.constexpr,
    PACKED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, FINE: tl.constexpr, FINE_PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of q, k, beta and log_decay of one chunk and tile of d_state. A key is read by queries (a), and reads
    the state itself (b): that is a query with the gradient -beta X and with earlier keys only."""
    nchunks = tl.cdiv(seqlen, C)
    c, row = tl.program_id(0) % nchunks, (tl.program_id(0) // nchunks).to(tl.int64)
    b, h = row // nheads, row % nheads
    i, j = tl.arange(0, C), tl.arange(0, BN) + tl.program_id(1) * BN
    n = tl.minimum(seqlen - c * C, C)
    t0 = c.to(tl.int64) * C
    q += b * sqb + h // heads_per_q * sqh + t0 * sql
    k += b * skb + h // heads_per_k * skh + t0 * skl
    v += b * svb + h * svh + t0 * svl
    dy += b * sdb + h * sdh + t0 * sdl
    u += ((b * seqlen + t0) * nheads + h) * P
    x += ((b * seqlen + t0) * nheads + h) * P
    entries += (row * nchunks + c) * N * P
    exits += (row * nchunks + c) * N * P
    a, at = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    e, et = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    dqt, dkt = tl.zeros([C, BN], tl.float32), tl.zeros([C, BN], tl.float32)
    read = tl.zeros([C, BN], tl.float32)
    kept, rate_grad = tl.zeros([BN], tl.float32), tl.zeros([C], tl.float32)
    for p0 in range(0, P, BP):
        p = tl.arange(0, BP) + p0
        dyt, ut, xt = (
            load(dy, i, n, sdl, p, P, 1),
            load(u, i, n, nheads * P, p, P, 1),
            load(x, i, n, nheads * P, p, P, 1),
        )
        state, dstate = load(entries, j, N, P, p, P, 1), load(exits, j, N, P, p, P, 1)
        a += dot(dyt, tl.trans(ut), DOT, PRECISION)
        at += dot(ut, tl.trans(dyt), DOT, PRECISION)
        e += dot(xt, tl.trans(ut), DOT, PRECISION)
        et += dot(ut, tl.trans(xt), DOT, PRECISION)
        dqt += dot(dyt, tl.trans(state), DOT, PRECISION)
        read += dot(xt, tl.trans(state), DOT, PRECISION)
        dkt += dot(ut, tl.trans(dstate), DOT, PRECISION)
        kept += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1)
        if tl.program_id(1) == 0:
            rate_grad += tl.sum(xt.to(tl.float32) * load(v, i, n, svl, p, P, 1).to(tl.float32), 1)
    here, entry, last = documents(ids, before, b * sib + t0, n, C, PACKED)
    gates = b * sgb + h * sgh + t0 * sgl
    qt, kt = load(q, i, n, sql, j, N, 1), load(k, i, n, skl, j, N, 1)
    rates = _rates(beta, b * sbb + h * sbh + t0 * sbl, sbl, n, C)
    if KIND == "channel":
        reach, left, passed = channel_factors(g + gates, i, n, sgl, j, N, here, entry, last, PACKED, False)
        cs = 0
        dqt, read, dkt = dqt * reach * scale, read * reach, dkt * left
    else:
        cs, total = sums(g, gates, sgl, n, C, KIND)
        reach, left, passed = factors(cs, total, here, entry, last, PACKED)
        dqt, read, dkt = dqt * (reach * scale)[:, None], read * reach[:, None], dkt * left[:, None]
    kept = passed * kept + tl.sum(kt.to(tl.float32) * dkt, 0)
    strict = i[:, None] > i[None, :]
    a = weigh(a, cs, here, KIND, PACKED, C, False) * scale
    at = weigh(at, cs, here, KIND, PACKED, C, True) * scale
    e = tl.where(strict, weigh(e, cs, here, KIND, PACKED, C, False), 0.0)
    et = tl.where(i[:, None] < i[None, :], weigh(et, cs, here, KIND, PACKED, C, True), 0.0) * -rates[None, :]
    if KIND == "channel":
        near_q, near_k = channel_gradients(a, at, q, k, g + gates, n, sql, skl, sgl, j, N, C, BN, FINE, FINE_PRECISION)
        near_read, near_keys = channel_gradients(
            e, et, k, k, g + gates, n, skl, skl, sgl, j, N, C, BN, FINE, FINE_PRECISION
        )
        dqt, dkt, read = dqt + near_q, dkt + near_k + near_keys, read + near_read
    else:
        dqt += dot(a, kt, DOT, PRECISION)
        dkt += dot(at, qt, DOT, PRECISION)
        dkt += dot(et, kt, DOT, PRECISION)
        read += dot(e, kt, DOT, PRECISION)
    rate_grad -= tl.sum(kt.to(tl.float32) * read, 1)
    read *= -rates[:, None]
    token = (b * rows + t0) * nheads + h
    tiles = tl.num_programs(1)
    store(dq + token * N, dqt, i, n, nheads * N, j, N)
    store(dk + token * N, dkt + read, i, n, nheads * N, j, N)
    tl.store(dbeta + (token + i * nheads) * tiles + tl.program_id(1), rate_grad, mask=i < n)
    if dg is not None:
        terms = qt.to(tl.float32) * dqt + kt.to(tl.float32) * (read - dkt)
        decay_gradient(dg, terms, kept, here, last, before, b * sib + t0, token, nheads, n, j, N, C, KIND, PACKED)
