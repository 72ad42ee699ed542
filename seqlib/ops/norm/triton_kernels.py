"""Triton kernels of the gated RMS norm: a tile is R rows of one group of D features, which B covers."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["gradients", "outputs"]


@triton.jit
def _normal(x, z, at, mask, LAST: tl.constexpr):
    """What is normalised, the gate and its derivative (1 and 0 without one)."""
    v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    gate, slope = tl.full(v.shape, 1.0, tl.float32), tl.zeros(v.shape, tl.float32)
    if z is not None:
        s = tl.load(z + at, mask=mask, other=0.0).to(tl.float32)
        open_ = tl.sigmoid(s)
        gate, slope = s * open_, open_ * (1.0 + s * (1.0 - open_))
    return v if LAST else v * gate, v, gate, slope


@triton.jit
def outputs(
    x, w, z, y, scales, rows, eps,
    D: tl.constexpr, GROUPS: tl.constexpr, R: tl.constexpr, B: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """y, and the inverse root mean square of every row and group. LAST: the gate comes after the norm."""
    r, j = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R), tl.arange(0, B)
    group = tl.program_id(1)
    mask = (r < rows)[:, None] & (j < D)[None, :]
    at = r[:, None] * (GROUPS * D) + group * D + j[None, :]
    v, _, gate, _ = _normal(x, z, at, mask, LAST)
    scale = 1.0 / tl.sqrt_rn(tl.sum(v * v, 1) / D + eps)
    tl.store(scales + r * GROUPS + group, scale, mask=r < rows)
    v *= scale[:, None]
    if w is not None:
        v *= tl.load(w + group * D + j, mask=j < D, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, v * gate if LAST else v, mask=mask)


@triton.jit
def gradients(
    dy, x, w, z, scales, dx, dz, dw, rows, tiles,
    D: tl.constexpr, GROUPS: tl.constexpr, R: tl.constexpr, B: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Gradients of a strip of `tiles` tiles; dw has one row per strip, so that its sum has one order."""
    j, group = tl.arange(0, B), tl.program_id(1)
    sum_w = tl.zeros([B], tl.float32)
    for tile in range(0, tiles):
        r = (tl.program_id(0).to(tl.int64) * tiles + tile) * R + tl.arange(0, R)
        mask = (r < rows)[:, None] & (j < D)[None, :]
        at = r[:, None] * (GROUPS * D) + group * D + j[None, :]
        v, plain, gate, slope = _normal(x, z, at, mask, LAST)
        scale = tl.load(scales + r * GROUPS + group, mask=r < rows, other=0.0)[:, None]
        given, v = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32), v * scale
        weight = tl.full([B], 1.0, tl.float32)
        if w is not None:  # read again for each tile: registers are scarcer than reads of what is near
            weight = tl.load(w + group * D + j, mask=j < D, other=0.0).to(tl.float32)
        dgate = given * v * weight[None, :]
        if LAST:
            given *= gate
        sum_w += tl.sum(given * v, 0)
        given *= weight[None, :]
        dv = scale * (given - v * (tl.sum(given * v, 1) / D)[:, None])
        tl.store(dx + at, dv if LAST else dv * gate, mask=mask)
        if dz is not None:
            tl.store(dz + at, (dgate if LAST else dv * plain) * slope, mask=mask)
    if dw is not None:
        tl.store(dw + tl.program_id(0) * GROUPS * D + group * D + j, sum_w, mask=j < D)
