"""Triton kernels of windowed attention, forward and backward, in blocks of BI queries and BJ keys.

Positions count from the first query, so that keys of the past are negative. Query head h reads key head h // group.
A query that sees nothing has a zero output. Scores are in base 2; `peaks` is log2 of each query's sum of exponentials.
"""

from __future__ import annotations

import triton
import triton.language as tl

from seqlib.ops.triton_chunks import dot, load, store

__all__ = ["grad_kv", "grad_q", "outputs"]


@triton.jit
def _seen(i, j, begin, end, window, CAUSAL: tl.constexpr):
    """Which keys j each query i may see; both have two axes."""
    seen = (j >= begin) & (j < end) & (i - j < window)
    return seen & (j <= i) if CAUSAL else seen & (j - i < window)


@triton.jit
def _bounds(begins, ends, b, past, seqlen):
    """The first key of a batch row and the one after its last."""
    begin, end = -past, seqlen
    if begins is not None:
        begin = tl.maximum(begin, tl.load(begins + b).to(tl.int32))
    if ends is not None:
        end = tl.minimum(end, tl.load(ends + b).to(tl.int32))
    return begin, end


@triton.jit
def outputs(
    q, k, v, begins, ends, y, peaks,
    sqb, sql, sqh, skb, skl, skh, svb, svl, svh, seqlen, past, window, nheads, group, scale,
    N: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr,
    CAUSAL: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y of one block of queries; scale has log2(e) in it."""
    blocks = tl.cdiv(seqlen, BI)
    i0, row = tl.program_id(0) % blocks * BI, (tl.program_id(0) // blocks).to(tl.int64)
    b, h = row // nheads, row % nheads
    i, j, n, p = tl.arange(0, BI), tl.arange(0, BJ), tl.arange(0, BN), tl.arange(0, BP)
    q += b * sqb + h * sqh + tl.cast(i0, tl.int64) * sql
    k += b * skb + h // group * skh
    v += b * svb + h // group * svh
    token = (b * seqlen + i0) * nheads + h
    rest = seqlen - i0
    queries = load(q, i, rest, sql, n, N, 1)
    begin, end = _bounds(begins, ends, b, past, seqlen)
    first, after = tl.maximum(begin, i0 - window + 1), tl.minimum(end, i0 + BI if CAUSAL else i0 + BI - 1 + window)
    most, total = tl.full([BI], -1e30, tl.float32), tl.zeros([BI], tl.float32)
    mixed = tl.zeros([BI, BP], tl.float32)
    for j0 in range(first, after, BJ):
        key = tl.cast(j0 + past, tl.int64)
        seen = _seen((i0 + i)[:, None], (j0 + j)[None, :], begin, end, window, CAUSAL)
        keys = load(k + key * skl, n, N, 1, j, end - j0, skl)
        scores = tl.where(seen, dot(queries, keys, DOT, PRECISION) * scale, -1e30)
        higher = tl.maximum(most, tl.max(scores, 1))
        shares = tl.where(seen, tl.exp2(scores - higher[:, None]), 0.0)
        shrink = tl.exp2(most - higher)
        total = total * shrink + tl.sum(shares, 1)
        mixed = mixed * shrink[:, None] + dot(shares, load(v + key * svl, j, end - j0, svl, p, P, 1), DOT, PRECISION)
        most = higher
    total = tl.where(total > 0.0, total, 1.0)
    store(y + token * P, mixed / total[:, None], i, rest, nheads * P, p, P)
    tl.store(peaks + token + i * nheads, most + tl.log2(total), mask=i < rest)


@triton.jit
def grad_q(
    q, k, v, dy, begins, ends, peaks, deltas, dq,
    sqb, sql, sqh, skb, skl, skh, svb, svl, svh, sdb, sdl, sdh, seqlen, past, window, nheads, group, scale, slope,
    N: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr,
    CAUSAL: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of one block of queries; `deltas` are the sums of y dy, `slope` the scale without log2(e)."""
    blocks = tl.cdiv(seqlen, BI)
    i0, row = tl.program_id(0) % blocks * BI, (tl.program_id(0) // blocks).to(tl.int64)
    b, h = row // nheads, row % nheads
    i, j, n, p = tl.arange(0, BI), tl.arange(0, BJ), tl.arange(0, BN), tl.arange(0, BP)
    q += b * sqb + h * sqh + tl.cast(i0, tl.int64) * sql
    k += b * skb + h // group * skh
    v += b * svb + h // group * svh
    token = (b * seqlen + i0) * nheads + h
    rest = seqlen - i0
    queries = load(q, i, rest, sql, n, N, 1)
    given = load(dy + b * sdb + h * sdh + tl.cast(i0, tl.int64) * sdl, i, rest, sdl, p, P, 1)
    peak = tl.load(peaks + token + i * nheads, mask=i < rest, other=0.0)
    delta = tl.load(deltas + token + i * nheads, mask=i < rest, other=0.0)
    begin, end = _bounds(begins, ends, b, past, seqlen)
    first, after = tl.maximum(begin, i0 - window + 1), tl.minimum(end, i0 + BI if CAUSAL else i0 + BI - 1 + window)
    grad = tl.zeros([BI, BN], tl.float32)
    for j0 in range(first, after, BJ):
        key = tl.cast(j0 + past, tl.int64)
        seen = _seen((i0 + i)[:, None], (j0 + j)[None, :], begin, end, window, CAUSAL)
        keys = load(k + key * skl, j, end - j0, skl, n, N, 1)
        values = load(v + key * svl, j, end - j0, svl, p, P, 1)
        scores = tl.where(seen, dot(queries, tl.trans(keys), DOT, PRECISION) * scale - peak[:, None], -1e30)
        dscores = tl.exp2(scores) * (dot(given, tl.trans(values), DOT, PRECISION) - delta[:, None])
        grad += dot(dscores, keys, DOT, PRECISION)
    store(dq + token * N, grad * slope, i, rest, nheads * N, n, N)


@triton.jit
def grad_kv(
    q, k, v, dy, begins, ends, peaks, deltas, dk, dv,
    sqb, sql, sqh, skb, skl, skh, svb, svl, svh, sdb, sdl, sdh, seqlen, past, window, nheads, group, scale, slope,
    N: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr,
    CAUSAL: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one block of keys and values, for every query head."""
    blocks = tl.cdiv(past + seqlen, BJ)
    j0, row = tl.program_id(0) % blocks * BJ - past, (tl.program_id(0) // blocks).to(tl.int64)
    b, h = row // nheads, row % nheads
    i, j, n, p = tl.arange(0, BI), tl.arange(0, BJ), tl.arange(0, BN), tl.arange(0, BP)
    key, rest = tl.cast(j0 + past, tl.int64), seqlen - j0
    q += b * sqb + h * sqh
    dy += b * sdb + h * sdh
    keys = load(k + b * skb + h // group * skh + key * skl, j, rest, skl, n, N, 1)
    values = load(v + b * svb + h // group * svh + key * svl, j, rest, svl, p, P, 1)
    begin, end = _bounds(begins, ends, b, past, seqlen)
    first = tl.maximum(0, j0 if CAUSAL else j0 - window + 1)
    after = tl.minimum(seqlen, j0 + BJ - 1 + window)
    dkeys, dvalues = tl.zeros([BJ, BN], tl.float32), tl.zeros([BJ, BP], tl.float32)
    for i0 in range(first, after, BI):
        left, t0 = seqlen - i0, tl.cast(i0, tl.int64)
        token = (b * seqlen + t0) * nheads + h
        queries, given = load(q + t0 * sql, i, left, sql, n, N, 1), load(dy + t0 * sdl, i, left, sdl, p, P, 1)
        peak = tl.load(peaks + token + i * nheads, mask=i < left, other=0.0)
        delta = tl.load(deltas + token + i * nheads, mask=i < left, other=0.0)
        seen = _seen((i0 + i)[None, :], (j0 + j)[:, None], begin, end, window, CAUSAL) & (i < left)[None, :]
        scores = tl.where(seen, dot(keys, tl.trans(queries), DOT, PRECISION) * scale - peak[None, :], -1e30)
        shares = tl.exp2(scores)
        dvalues += dot(shares, given, DOT, PRECISION)
        dscores = shares * (dot(values, tl.trans(given), DOT, PRECISION) - delta[None, :])
        dkeys += dot(dscores, queries, DOT, PRECISION)
    at = (b * (past + seqlen) + key) * nheads + h
    store(dk + at * N, dkeys * slope, j, rest, nheads * N, n, N)
    store(dv + at * P, dvalues, j, rest, nheads * P, p, P)
