"""Triton kernels of linear attention: the state chunk by chunk, the outputs beside it, the gradients of each chunk.

Sizes: batch b, nheads h, chunk of C tokens, d_state N in tiles of BN, headdim P in tiles of BP. A sequence is cut into
spans of chunks so that few heads still fill the device; the summary of a span says what it does to the state. No
accumulator is transposed to feed a product: some versions of Triton get that wrong on Hopper, so products are formed a
second time from loaded tiles instead.
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

__all__ = ["grad_qk", "mix", "outputs", "states"]


@triton.jit
def _entry(
    carry, span_states, span_decays, row, span, nspans, j, p,
    N: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The state that a span starts from: `carry` through all spans before it."""
    state = tl.zeros([BN, BP], tl.float32)
    if carry is not None:
        state = load(carry + row * N * P, j, N, P, p, P, 1)
    if span_states is not None:
        for step in range(0, nspans - 1 - span if REVERSE else span):
            at = row * nspans + (nspans - 1 - step if REVERSE else step)
            decay = tl.load(span_decays + at * N + j, mask=j < N, other=0.0)
            state = decay[:, None] * state + load(span_states + at * N * P, j, N, P, p, P, 1)
    return state


@triton.jit
def states(
    x, w, g, ids, before, carry, span_states, span_decays, entries, final,
    sxb, sxl, sxh, swb, swl, swh, sgb, sgl, sgh, sib,
    seqlen, nheads, heads_per_x, chunks_per_span, nspans, scale,
    N: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, C: tl.constexpr, KIND: tl.constexpr,
    PACKED: tl.constexpr, REVERSE: tl.constexpr, SUMMARY: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state, span by span: state <- passed state + (left x)^T w per chunk, x and w being keys and values.

    REVERSE runs from the end with queries and gradients of outputs, and gives the gradient of the state. SUMMARY starts
    each span from zero and leaves its state and decay in span_states and span_decays. Without it spans start from those
    and `carry`; the state that each chunk starts from goes into `entries`, the last one into `final`.
    """
    span, row = tl.program_id(0) % nspans, (tl.program_id(0) // nspans).to(tl.int64)
    b, h = row // nheads, row % nheads
    tiles = tl.cdiv(P, BP)
    i = tl.arange(0, C)
    j = tl.arange(0, BN) + tl.program_id(1) // tiles * BN
    p = tl.arange(0, BP) + tl.program_id(1) % tiles * BP
    x += b * sxb + h // heads_per_x * sxh
    w += b * swb + h * swh
    nchunks = tl.cdiv(seqlen, C)
    first = span * chunks_per_span
    end = tl.minimum(first + chunks_per_span, nchunks)
    through = tl.full([BN], 1.0, tl.float32)
    if SUMMARY:
        state = tl.zeros([BN, BP], tl.float32)
    else:
        state = _entry(carry, span_states, span_decays, row, span, nspans, j, p, N, P, BN, BP, REVERSE)
    for step in range(first, end):
        c = first + end - 1 - step if REVERSE else step
        n = tl.minimum(seqlen - c * C, C)
        t0 = tl.cast(c, tl.int64) * C
        if entries is not None:
            store(entries + (row * nchunks + c) * N * P, state, j, N, P, p, P)
        here, entry, last = documents(ids, before, b * sib + t0, n, C, PACKED)
        xt, wt = load(x + t0 * sxl, j, N, 1, i, n, sxl), load(w + t0 * swl, i, n, swl, p, P, 1)
        at = b * sgb + h * sgh + t0 * sgl
        if KIND == "channel":
            reach, left, passed = channel_factors(g + at, i, n, sgl, j, N, here, entry, last, PACKED, True)
            xt = xt.to(tl.float32) * (reach * scale if REVERSE else left)
            state *= passed[:, None]
        else:
            cs, total = sums(g, at, sgl, n, C, KIND)
            reach, left, passed = factors(cs, total, here, entry, last, PACKED)
            wt = wt.to(tl.float32) * (reach * scale if REVERSE else left)[:, None]
            state *= passed
        through *= passed
        state += dot(xt, wt, DOT, PRECISION)
    if SUMMARY:
        at = row * nspans + span
        store(span_states + at * N * P, state, j, N, P, p, P)
        tl.store(span_decays + at * N + j, through, mask=j < N)
    elif span == (0 if REVERSE else nspans - 1):
        store(final + row * N * P, state, j, N, P, p, P)


@triton.jit
def outputs(
    q, k, v, g, ids, before, carry, span_states, span_decays, y, final,
    sqb, sql, sqh, skb, skl, skh, svb, svl, svh, sgb, sgl, sgh, sib,
    rows, seqlen, nheads, heads_per_q, heads_per_k, chunks_per_span, nspans, scale,
    N: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, C: tl.constexpr, KIND: tl.constexpr,
    PACKED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, FINE: tl.constexpr, FINE_PRECISION: tl.constexpr,
):  # fmt: skip
    """y of one span and tile of headdim, and the state after the last span. BN covers all of d_state."""
    span, row = tl.program_id(0) % nspans, (tl.program_id(0) // nspans).to(tl.int64)
    b, h = row // nheads, row % nheads
    i, j, p = tl.arange(0, C), tl.arange(0, BN), tl.arange(0, BP) + tl.program_id(1) * BP
    q += b * sqb + h // heads_per_q * sqh
    k += b * skb + h // heads_per_k * skh
    v += b * svb + h * svh
    y += (b * rows * nheads + h) * P
    first = span * chunks_per_span
    end = tl.minimum(first + chunks_per_span, tl.cdiv(seqlen, C))
    state = _entry(carry, span_states, span_decays, row, span, nspans, j, p, N, P, BN, BP, False)
    for c in range(first, end):
        n = tl.minimum(seqlen - c * C, C)
        t0 = tl.cast(c, tl.int64) * C
        here, entry, last = documents(ids, before, b * sib + t0, n, C, PACKED)
        qt, kt = load(q + t0 * sql, i, n, sql, j, N, 1), load(k + t0 * skl, j, N, 1, i, n, skl)
        vt = load(v + t0 * svl, i, n, svl, p, P, 1)
        at = b * sgb + h * sgh + t0 * sgl
        if KIND == "channel":
            scores = channel_scores(
                q + t0 * sql, k + t0 * skl, g + at, n, sql, skl, sgl, j, N, C, FINE, FINE_PRECISION, False
            )
            scores = weigh(scores, 0, here, KIND, PACKED, C, False)
            reach, _, passed = channel_factors(g + at, i, n, sgl, j, N, here, entry, last, PACKED, False)
            _, left, _ = channel_factors(g + at, i, n, sgl, j, N, here, entry, last, PACKED, True)
            out = dot(qt.to(tl.float32) * reach, state, DOT, PRECISION)
            kt = kt.to(tl.float32) * left
            out += dot(scores, vt, DOT, PRECISION)
            state *= passed[:, None]
        else:
            cs, total = sums(g, at, sgl, n, C, KIND)
            reach, left, passed = factors(cs, total, here, entry, last, PACKED)
            scores = weigh(dot(qt, kt, DOT, PRECISION), cs, here, KIND, PACKED, C, False)
            out = dot(qt, state, DOT, PRECISION) * reach[:, None]
            out += dot(scores, vt, DOT, PRECISION)
            vt = vt.to(tl.float32) * left[:, None]
            state *= passed
        state += dot(kt, vt, DOT, PRECISION)
        store(y + t0 * nheads * P, out * scale, i, n, nheads * P, p, P)
    if span == nspans - 1:
        store(final + row * N * P, state, j, N, P, p, P)


@triton.jit
def grad_qk(
    q, k, v, dy, g, ids, before, entries, exits, dq, dk, dg,
    sqb, sql, sqh, skb, skl, skh, svb, svl, svh, sdb, sdl, sdh, sgb, sgl, sgh, sib,
    rows, seqlen, nheads, heads_per_q, heads_per_k, scale,
    N: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, C: tl.constexpr, KIND: tl.constexpr,
    PACKED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, FINE: tl.constexpr, FINE_PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of q, k and log_decay of one chunk and tile of d_state, from the state that enters the chunk and the
    gradient of the one that leaves it. Every value head writes its own; dg of a token has one value per tile. What is
    written has `rows` tokens per batch row, of which this call sees `seqlen`."""
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
    entries += (row * nchunks + c) * N * P
    exits += (row * nchunks + c) * N * P
    a, at = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    dqt, dkt = tl.zeros([C, BN], tl.float32), tl.zeros([C, BN], tl.float32)
    kept = tl.zeros([BN], tl.float32)
    for p0 in range(0, P, BP):
        p = tl.arange(0, BP) + p0
        vt, dyt = load(v, i, n, svl, p, P, 1), load(dy, i, n, sdl, p, P, 1)
        state, dstate = load(entries, j, N, P, p, P, 1), load(exits, j, N, P, p, P, 1)
        a += dot(dyt, tl.trans(vt), DOT, PRECISION)
        at += dot(vt, tl.trans(dyt), DOT, PRECISION)
        dqt += dot(dyt, tl.trans(state), DOT, PRECISION)
        dkt += dot(vt, tl.trans(dstate), DOT, PRECISION)
        kept += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1)
    here, entry, last = documents(ids, before, b * sib + t0, n, C, PACKED)
    gates = b * sgb + h * sgh + t0 * sgl
    qt, kt = load(q, i, n, sql, j, N, 1), load(k, i, n, skl, j, N, 1)
    if KIND == "channel":
        reach, left, passed = channel_factors(g + gates, i, n, sgl, j, N, here, entry, last, PACKED, False)
        a = weigh(a, 0, here, KIND, PACKED, C, False) * scale
        at = weigh(at, 0, here, KIND, PACKED, C, True) * scale
        dqt *= reach * scale
        dkt *= left
        kept = passed * kept + tl.sum(kt.to(tl.float32) * dkt, 0)
        near_q, near_k = channel_gradients(a, at, q, k, g + gates, n, sql, skl, sgl, j, N, C, BN, FINE, FINE_PRECISION)
        dqt += near_q
        dkt += near_k
    else:
        cs, total = sums(g, gates, sgl, n, C, KIND)
        reach, left, passed = factors(cs, total, here, entry, last, PACKED)
        a = weigh(a, cs, here, KIND, PACKED, C, False) * scale
        at = weigh(at, cs, here, KIND, PACKED, C, True) * scale
        dqt *= (reach * scale)[:, None]
        dkt *= left[:, None]
        kept = passed * kept + tl.sum(kt.to(tl.float32) * dkt, 0)
        dqt += dot(a, kt, DOT, PRECISION)
        dkt += dot(at, qt, DOT, PRECISION)
    token = (b * rows + t0) * nheads + h
    store(dq + token * N, dqt, i, n, nheads * N, j, N)
    store(dk + token * N, dkt, i, n, nheads * N, j, N)
    if dg is not None:
        terms = qt.to(tl.float32) * dqt - kt.to(tl.float32) * dkt
        decay_gradient(dg, terms, kept, here, last, before, b * sib + t0, token, nheads, n, j, N, C, KIND, PACKED)


@triton.jit
def mix(
    x, z, u, g, ids, before, states, out,
    sxb, sxl, sxh, szb, szl, szh, sub, sul, suh, sgb, sgl, sgh, sib,
    rows, seqlen, nheads, heads_per_x, heads_per_z, scale,
    N: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, C: tl.constexpr, KIND: tl.constexpr,
    PACKED: tl.constexpr, TURNED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, FINE: tl.constexpr,
    FINE_PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk and tile of headdim of y, from x, z, u = q, k, v and the state that enters the chunk; or, TURNED, of
    the gradient of v, from k, q, dy and the gradient of the state that leaves it (which has the scale in it). Without
    states it is what the chunk itself gives."""
    nchunks = tl.cdiv(seqlen, C)
    c, row = tl.program_id(0) % nchunks, (tl.program_id(0) // nchunks).to(tl.int64)
    b, h = row // nheads, row % nheads
    i, p = tl.arange(0, C), tl.arange(0, BP) + tl.program_id(1) * BP
    n = tl.minimum(seqlen - c * C, C)
    t0 = c.to(tl.int64) * C
    x += b * sxb + h // heads_per_x * sxh + t0 * sxl
    z += b * szb + h // heads_per_z * szh + t0 * szl
    u += b * sub + h * suh + t0 * sul
    if states is not None:
        states += (row * nchunks + c) * N * P
    here, entry, last = documents(ids, before, b * sib + t0, n, C, PACKED)
    gates = b * sgb + h * sgh + t0 * sgl
    scores, mixed = tl.zeros([C, C], tl.float32), tl.zeros([C, BP], tl.float32)
    for n0 in range(0, N, BN):
        j = tl.arange(0, BN) + n0
        xt = load(x, i, n, sxl, j, N, 1)
        if KIND == "channel":
            if TURNED:
                scores += channel_scores(z, x, g + gates, n, szl, sxl, sgl, j, N, C, FINE, FINE_PRECISION, True)
            else:
                scores += channel_scores(x, z, g + gates, n, sxl, szl, sgl, j, N, C, FINE, FINE_PRECISION, False)
        else:
            scores += dot(xt, tl.trans(load(z, i, n, szl, j, N, 1)), DOT, PRECISION)
        if states is not None:
            if KIND == "channel":
                reach, left, _ = channel_factors(g + gates, i, n, sgl, j, N, here, entry, last, PACKED, False)
                xt = xt.to(tl.float32) * (left if TURNED else reach)
            mixed += dot(xt, load(states, j, N, P, p, P, 1), DOT, PRECISION)
    if KIND == "channel":
        scores = weigh(scores, 0, here, KIND, PACKED, C, TURNED)
    else:
        cs, total = sums(g, gates, sgl, n, C, KIND)
        reach, left, _ = factors(cs, total, here, entry, last, PACKED)
        scores = weigh(scores, cs, here, KIND, PACKED, C, TURNED)
        mixed *= (left if TURNED else reach)[:, None]
    mixed = (mixed if TURNED else mixed * scale) + dot(scores * scale, load(u, i, n, sul, p, P, 1), DOT, PRECISION)
    store(out + ((b * rows + t0) * nheads + h) * P, mixed, i, n, nheads * P, p, P)
