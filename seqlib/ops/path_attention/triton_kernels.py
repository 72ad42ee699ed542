"""Triton kernels of PaTH attention, forward and backward, on blocks of C tokens.

A block of queries x walks back over the blocks of keys before it: it meets their scores x k^T and comes through their
maps, x <- x - (x w^T) tw. The blocks of one head are numbered from the first one of the past, the blocks of queries c
from the first one after it; those of R query heads that share a key head lie side by side. `sums` are log-decays up to
each token in float64. Scores are in base 2; `peaks` is log2 of each query's sum of exponentials.
"""

from __future__ import annotations

import triton
import triton.language as tl

from seqlib.ops.triton_chunks import LOG2E, dot, load, store

__all__ = ["carry", "grad_keys", "grad_maps", "grad_queries", "outputs"]

UNSEEN = tl.constexpr(-1e30)


@triton.jit
def _block(first, count, blocks, R):
    """Of one program: the row of batch and key heads, the block of queries, and its place among all of them."""
    pid = tl.program_id(0)
    row, c = (pid // (count * R)).to(tl.int64), first + pid // R % count
    return row, c, (row * blocks + c) * R + pid % R


@triton.jit
def _local(local, query, n, i, j, C: tl.constexpr):
    """Scores within a block, n of its queries, not yet scaled. i are queries and j keys, both with two axes."""
    return tl.load(local + query * C * C + i * C + j, mask=(i >= j) & (i < n), other=0.0)


@triton.jit
def _decay(sums, row, block, other, r, total, R, C: tl.constexpr):
    """Log-decays of the queries of a block since it began, and of keys up to there."""
    at = sums + ((row * total + block) * R + r) * C
    began, i = tl.load(at), tl.arange(0, C)
    keys = tl.load(sums + ((row * total + other) * R + r) * C + i)
    return (tl.load(at + i) - began).to(tl.float32) * LOG2E, (began - keys).to(tl.float32) * LOG2E


@triton.jit
def _through(x, w, tw, row, block, total, n, N, C: tl.constexpr, PRECISION: tl.constexpr):
    """x w^T tw for the maps of a block, in float32: what is rounded here goes on to all blocks before."""
    i, at = tl.arange(0, C), (row * total + block) * C * N
    x = dot(x, load(w + at, n, N, 1, i, C, N), tl.float32, PRECISION)
    return dot(x, load(tw + at, i, C, N, n, N, 1), tl.float32, PRECISION)


@triton.jit
def outputs(
    q, k, v, w, tw, local, sums, y, peaks, blocks, past, R, scale,
    N: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, C: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, FINE_PRECISION: tl.constexpr,
):  # fmt: skip
    """y of one block of queries; scale has log2(e) in it."""
    row, c, query = _block(0, blocks, blocks, R)
    total, r = past + blocks, tl.program_id(0) % R
    i, n, p = tl.arange(0, C), tl.arange(0, BN), tl.arange(0, BP)
    k += row * total * C * N
    v += row * total * C * P
    x = load(q + query * C * N, i, C, N, n, N, 1).to(tl.float32)
    scores = _local(local, query, C, i[:, None], i[None, :], C) * scale
    if sums is not None:
        since, until = _decay(sums, row, past + c, past + c, r, total, R, C)
        scores += since[:, None] + until[None, :]
    scores = tl.where(i[:, None] >= i[None, :], scores, UNSEEN)
    most = tl.max(scores, 1)
    shares = tl.exp2(scores - most[:, None])
    sum_ = tl.sum(shares, 1)
    mixed = dot(shares, load(v + (past + c) * C * P, i, C, P, p, P, 1), DOT, PRECISION)
    for step in range(0, past + c):
        b = past + c - 1 - step
        scores = dot(x, load(k + b * C * N, n, N, 1, i, C, N), DOT, PRECISION) * scale
        if sums is not None:
            since, until = _decay(sums, row, past + c, b, r, total, R, C)
            scores += since[:, None] + until[None, :]
        higher = tl.maximum(most, tl.max(scores, 1))
        shares, shrink = tl.exp2(scores - higher[:, None]), tl.exp2(most - higher)
        sum_ = sum_ * shrink + tl.sum(shares, 1)
        mixed = mixed * shrink[:, None] + dot(shares, load(v + b * C * P, i, C, P, p, P, 1), DOT, PRECISION)
        most = higher
        x -= _through(x, w, tw, row, b, total, n, N, C, FINE_PRECISION)
    store(y + query * C * P, mixed / sum_[:, None], i, C, P, p, P)
    tl.store(peaks + query * C + i, most + tl.log2(sum_))


@triton.jit
def carry(
    q, w, tw, x, first, count, width, blocks, past, R,
    N: tl.constexpr, BN: tl.constexpr, C: tl.constexpr, FINE_PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of queries as it comes to each of `width` blocks of keys; `count` blocks from `first` on."""
    row, c, query = _block(first, count, blocks, R)
    i, n = tl.arange(0, C), tl.arange(0, BN)
    x += tl.program_id(0).to(tl.int64) * width * C * N
    carried = load(q + query * C * N, i, C, N, n, N, 1).to(tl.float32)
    for step in range(0, past + c):
        b = past + c - 1 - step
        store(x + b * C * N, carried, i, C, N, n, N)
        carried -= _through(carried, w, tw, row, b, past + blocks, n, N, C, FINE_PRECISION)


@triton.jit
def grad_queries(
    k, v, w, tw, local, sums, x, dy, peaks, deltas, dq, dlocal, g, first, count, width, blocks, past, R, scale, slope,
    N: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, C: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, FINE_PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of queries and of its own scores, and g, of the queries as they leave each block of keys.

    `deltas` are the sums of y dy, `slope` the scale without log2(e)."""
    row, c, query = _block(first, count, blocks, R)
    total, r = past + blocks, tl.program_id(0) % R
    i, n, p = tl.arange(0, C), tl.arange(0, BN), tl.arange(0, BP)
    seen = i[:, None] >= i[None, :]
    k += row * total * C * N
    v += row * total * C * P
    x += tl.program_id(0).to(tl.int64) * width * C * N
    g += tl.program_id(0).to(tl.int64) * width * C * N
    given = load(dy + query * C * P, i, C, P, p, P, 1)
    peak, delta = tl.load(peaks + query * C + i), tl.load(deltas + query * C + i)
    scores = _local(local, query, C, i[:, None], i[None, :], C) * scale
    if sums is not None:
        since, until = _decay(sums, row, past + c, past + c, r, total, R, C)
        scores += since[:, None] + until[None, :]
    shares = tl.exp2(tl.where(seen, scores, UNSEEN) - peak[:, None])
    slopes = dot(given, load(v + (past + c) * C * P, p, P, 1, i, C, P), DOT, PRECISION) - delta[:, None]
    tl.store(dlocal + query * C * C + i[:, None] * C + i[None, :], shares * slopes * slope)
    grad = tl.zeros([C, BN], tl.float32)
    for b in range(0, past + c):
        store(g + b * C * N, grad, i, C, N, n, N)
        keys = load(k + b * C * N, i, C, N, n, N, 1)
        scores = dot(load(x + b * C * N, i, C, N, n, N, 1), tl.trans(keys), DOT, PRECISION) * scale
        if sums is not None:
            since, until = _decay(sums, row, past + c, b, r, total, R, C)
            scores += since[:, None] + until[None, :]
        slopes = dot(given, load(v + b * C * P, p, P, 1, i, C, P), DOT, PRECISION) - delta[:, None]
        shares = tl.exp2(scores - peak[:, None])
        grad -= _through(grad, tw, w, row, b, total, n, N, C, FINE_PRECISION)
        grad += dot(shares * slopes * slope, keys, DOT, PRECISION)
    store(dq + query * C * N, grad, i, C, N, n, N)


@triton.jit
def grad_keys(
    k, v, local, sums, x, dy, peaks, deltas, dk, dv, dsums,
    first, count, width, blocks, past, R, scale, slope,
    N: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, C: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to the gradients of a block of keys and values and of its sums what `count` blocks of queries give."""
    row, b = (tl.program_id(0) // width).to(tl.int64), tl.program_id(0) % width
    total = past + blocks
    i, n, p = tl.arange(0, C), tl.arange(0, BN), tl.arange(0, BP)
    at = (row * total + b) * C
    keys, values = load(k + at * N, i, C, N, n, N, 1), load(v + at * P, i, C, P, p, P, 1)
    dkeys, dvalues = load(dk + at * N, i, C, N, n, N, 1), load(dv + at * P, i, C, P, p, P, 1)
    for r in range(0, R):
        falls = tl.zeros([C], tl.float32)
        for c in range(tl.maximum(first, b - past), first + count):
            query = (row * blocks + c) * R + r
            own = past + c == b
            arrived = x + (((row * count + c - first) * R + r) * width + b) * C * N
            given = load(dy + query * C * P, i, C, P, p, P, 1)
            peak, delta = tl.load(peaks + query * C + i), tl.load(deltas + query * C + i)
            queries = load(arrived, i, tl.where(own, 0, C), N, n, N, 1)
            scores = dot(keys, tl.trans(queries), DOT, PRECISION)
            scores = (scores + _local(local, query, tl.where(own, C, 0), i[None, :], i[:, None], C)) * scale
            if sums is not None:
                since, until = _decay(sums, row, past + c, b, r, total, R, C)
                scores += since[None, :] + until[:, None]
            seen = (i[None, :] >= i[:, None]) | (past + c > b)
            shares = tl.exp2(tl.where(seen, scores, UNSEEN) - peak[None, :])
            dvalues += dot(shares, given, DOT, PRECISION)
            slopes = shares * (dot(values, tl.trans(given), DOT, PRECISION) - delta[None, :])
            dkeys += dot(slopes * slope, queries, DOT, PRECISION)
            falls -= tl.sum(slopes, 1)
        if dsums is not None:
            place = dsums + ((row * total + b) * R + r) * C + i
            tl.store(place, tl.load(place) + falls)
    store(dk + at * N, dkeys, i, C, N, n, N)
    store(dv + at * P, dvalues, i, C, P, p, P)


@triton.jit
def grad_maps(
    w, tw, x, g, dw, dtw, first, count, width, blocks, past, R,
    N: tl.constexpr, BN: tl.constexpr, C: tl.constexpr, FINE_PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to the gradients of w and tw of a block what `count` blocks of queries give."""
    row, b = (tl.program_id(0) // width).to(tl.int64), tl.program_id(0) % width
    i, n = tl.arange(0, C), tl.arange(0, BN)
    at = (row * (past + blocks) + b) * C * N
    ours, theirs = load(w + at, n, N, 1, i, C, N), load(tw + at, n, N, 1, i, C, N)
    dours, dtheirs = load(dw + at, i, C, N, n, N, 1), load(dtw + at, i, C, N, n, N, 1)
    for step in range(0, R * (first + count - tl.maximum(first, b - past + 1))):
        c = first + count - 1 - step // R
        place = (((row * count + c - first) * R + step % R) * width + b) * C * N
        arrived, left = load(x + place, i, C, N, n, N, 1), load(g + place, i, C, N, n, N, 1)
        along = dot(arrived, ours, tl.float32, FINE_PRECISION)
        back = dot(left, theirs, tl.float32, FINE_PRECISION)
        dtheirs -= dot(tl.trans(along), left, tl.float32, FINE_PRECISION)
        dours -= dot(tl.trans(back), arrived, tl.float32, FINE_PRECISION)
    store(dw + at, dours, i, C, N, n, N)
    store(dtw + at, dtheirs, i, C, N, n, N)
