"""Triton kernel of the softmax cross entropy: a row of logits is read twice and its gradient written in its place."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["losses"]

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _shaped(z, scale, cap, CAPPED: tl.constexpr):
    """Logits as the softmax sees them. tanh by an exponential that cannot overflow."""
    z = z.to(tl.float32) * scale
    if CAPPED:
        shrink = tl.exp2(tl.abs(z) / cap * (-2.0 * LOG2E))
        size = cap * (1.0 - shrink) / (1.0 + shrink)
        z = tl.where(z < 0.0, -size, size)
    return z


@triton.jit
def losses(
    logits, targets, divisor, losses, stride, ignore_index, scale, cap,
    V: tl.constexpr, B: tl.constexpr, CAPPED: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """The loss of one row, and d loss / divisor / d logits over the logits."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    if target == ignore_index:
        tl.store(losses + row, 0.0)
        if GRADIENT:
            for v0 in range(0, V, B):
                v = v0 + tl.arange(0, B)
                tl.store(logits + v, tl.zeros([B], tl.float32), mask=v < V)
    else:
        most, total = tl.full([B], -1e30, tl.float32), tl.zeros([B], tl.float32)
        for v0 in range(0, V, B):
            v = v0 + tl.arange(0, B)
            z = tl.where(v < V, _shaped(tl.load(logits + v, mask=v < V, other=0.0), scale, cap, CAPPED), -1e30)
            higher = tl.maximum(most, z)
            total = total * tl.exp2((most - higher) * LOG2E) + tl.exp2((z - higher) * LOG2E)
            most = higher
        largest = tl.max(most, 0)
        # Lanes that saw nothing but padding have -1e30 for their largest, and so no weight.
        log_z = largest + tl.log(tl.sum(total * tl.exp2((most - largest) * LOG2E), 0))
        tl.store(losses + row, log_z - _shaped(tl.load(logits + target), scale, cap, CAPPED))
        if GRADIENT:
            tl.debug_barrier()  # the target's logit is read before it is written over
            share = scale / tl.load(divisor).to(tl.float32)
            for v0 in range(0, V, B):
                v = v0 + tl.arange(0, B)
                z = _shaped(tl.load(logits + v, mask=v < V, other=0.0), scale, cap, CAPPED)
                grad = (tl.exp2((z - log_z) * LOG2E) - tl.where(v == target, 1.0, 0.0)) * share
                if CAPPED:
                    grad *= 1.0 - (z / cap) * (z / cap)
                tl.store(logits + v, grad, mask=v < V)
