"""Triton kernels that rotate pairs of features of all heads: a tile is T tokens by W angles, which B covers.

PAIRS says where the two features of angle i lie: "halves" at i and i + W, "neighbours" at 2i and 2i + 1, "doubled" as
"halves" in the wide tensor, while the narrow one has the first alone. Angles are those of the token, or with PER_HEAD
of the token and the head. REST covers the features that pass.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["grad_theta", "turn"]


@triton.jit
def _tokens(positions, tokens, seqlen, spb, spl, T: tl.constexpr):
    """Tokens of this program and their positions."""
    t = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    return t, tl.load(positions + t // seqlen * spb + t % seqlen * spl, mask=t < tokens, other=0).to(tl.float32)


@triton.jit
def _circle(theta, position, i, W):
    angle = position[:, None] * tl.load(theta + i, mask=i < W, other=0.0)[None, :]
    return tl.cos(angle), tl.sin(angle)


@triton.jit
def _turn_heads(
    x, y, theta, position, t, tokens, heads, sxt, sxh, D,
    W: tl.constexpr, B: tl.constexpr, REST: tl.constexpr, PAIRS: tl.constexpr, PER_HEAD: tl.constexpr,
    BACK: tl.constexpr,
):  # fmt: skip
    """y from x, by the opposite angle when BACK."""
    i, j = tl.arange(0, B), 2 * W + tl.arange(0, REST if REST > 0 else 1)
    near, far = (2 * i, 2 * i + 1) if PAIRS == "neighbours" else (i, i + W)
    mask, rest = (t < tokens)[:, None] & (i < W)[None, :], (t < tokens)[:, None] & (j < D)[None, :]
    width = (W if BACK else 2 * W) if PAIRS == "doubled" else D
    cos, sin = _circle(theta, position, i, W)
    for h in range(0, heads):
        if PER_HEAD:
            cos, sin = _circle(theta + h * W, position, i, W)
        from_ = x + t[:, None] * sxt + h * sxh
        to = y + (t[:, None] * heads + h) * width
        a = tl.load(from_ + near[None, :], mask=mask, other=0.0).to(tl.float32)
        if PAIRS == "doubled" and not BACK:
            tl.store(to + near[None, :], a * cos, mask=mask)
            tl.store(to + far[None, :], a * sin, mask=mask)
        else:
            b = tl.load(from_ + far[None, :], mask=mask, other=0.0).to(tl.float32)
            tl.store(to + near[None, :], a * cos + b * sin if BACK else a * cos - b * sin, mask=mask)
            if PAIRS != "doubled":
                tl.store(to + far[None, :], b * cos - a * sin if BACK else b * cos + a * sin, mask=mask)
        if REST > 0:
            tl.store(to + j[None, :], tl.load(from_ + j[None, :], mask=rest, other=0.0), mask=rest)


@triton.jit
def turn(
    q, k, theta, positions, made_q, made_k,
    tokens, seqlen, spb, spl, sqt, sqh, skt, skh, heads_q, heads_k, D,
    W: tl.constexpr, B: tl.constexpr, T: tl.constexpr, REST: tl.constexpr, PAIRS: tl.constexpr,
    PER_HEAD: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """All heads of q and k of a tile of tokens."""
    t, position = _tokens(positions, tokens, seqlen, spb, spl, T)
    _turn_heads(q, made_q, theta, position, t, tokens, heads_q, sqt, sqh, D, W, B, REST, PAIRS, PER_HEAD, BACK)
    _turn_heads(k, made_k, theta, position, t, tokens, heads_k, skt, skh, D, W, B, REST, PAIRS, PER_HEAD, BACK)


@triton.jit
def _slopes(
    x, dy, cos, sin, t, tokens, h, heads, sxt, sxh, D, W: tl.constexpr, B: tl.constexpr, PAIRS: tl.constexpr
):  # fmt: skip
    """Gradient of the angles of a head: of a turned pair (a, b) it is a db - b da."""
    i = tl.arange(0, B)
    near, far = (2 * i, 2 * i + 1) if PAIRS == "neighbours" else (i, i + W)
    mask = (t < tokens)[:, None] & (i < W)[None, :]
    from_, given = x + t[:, None] * sxt + h * sxh, dy + (t[:, None] * heads + h) * (2 * W if PAIRS == "doubled" else D)
    a = tl.load(from_ + near[None, :], mask=mask, other=0.0).to(tl.float32)
    da = tl.load(given + near[None, :], mask=mask, other=0.0).to(tl.float32)
    db = tl.load(given + far[None, :], mask=mask, other=0.0).to(tl.float32)
    if PAIRS == "doubled":
        return a * (cos * db - sin * da)
    b = tl.load(from_ + far[None, :], mask=mask, other=0.0).to(tl.float32)
    return (a * cos - b * sin) * db - (b * cos + a * sin) * da


@triton.jit
def grad_theta(
    q, k, theta, positions, dq, dk, dtheta,
    tokens, seqlen, spb, spl, sqt, sqh, skt, skh, heads_q, heads_k, D,
    W: tl.constexpr, B: tl.constexpr, T: tl.constexpr, REST: tl.constexpr, PAIRS: tl.constexpr,
    PER_HEAD: tl.constexpr,
):  # fmt: skip
    """Gradient of theta due to a tile of tokens; one row for each program, so that their sum has one order."""
    t, position = _tokens(positions, tokens, seqlen, spb, spl, T)
    i = tl.arange(0, B)
    dtheta += tl.program_id(0).to(tl.int64) * W * (heads_q if PER_HEAD else 1)
    cos, sin = _circle(theta, position, i, W)
    sum_ = tl.zeros([B], tl.float32)
    for h in range(0, tl.maximum(heads_q, heads_k)):
        if PER_HEAD:
            cos, sin = _circle(theta + h * W, position, i, W)
            sum_ = tl.zeros([B], tl.float32)
        slopes = tl.zeros([T, B], tl.float32)
        if h < heads_q:
            slopes += _slopes(q, dq, cos, sin, t, tokens, h, heads_q, sqt, sqh, D, W, B, PAIRS)
        if h < heads_k:
            slopes += _slopes(k, dk, cos, sin, t, tokens, h, heads_k, skt, skh, D, W, B, PAIRS)
        sum_ += tl.sum(slopes * position[:, None], 0)
        if PER_HEAD:
            tl.store(dtheta + h * W + i, sum_, mask=i < W)
    if not PER_HEAD:
        tl.store(dtheta + i, sum_, mask=i < W)
