"""Kernels of state spaces as real matrix products."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from seqlib.ops.ssm_kernel.discretize import discretize

__all__ = [
    "block_size",
    "cauchy",
    "diag",
    "dplr",
    "powers",
    "real_pairs",
    "tables",
    "to_kernel",
    "vandermonde",
    "weights",
]


def diag(A: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int, *, discretization: str) -> Tensor:
    high = torch.float64 if dt.dtype == torch.float64 else torch.float32
    with torch.autocast(dt.device.type, enabled=False):
        log_decay, weight = weights(A, B, C, dt, discretization)
        kernel = vandermonde(log_decay, weight, length, high)
        return kernel.transpose(0, 1).reshape(*C.shape[:-2], C.shape[-2], length)


def weights(A: Tensor, B: Tensor, C: Tensor, dt: Tensor, discretization: str) -> tuple[Tensor, Tensor]:
    """log_decay (d, n) and the factor of its powers in the kernel (d, c, n), in float64."""
    log_decay, B_bar = discretize(A, B, dt, discretization)
    weight = (C * B_bar).reshape(-1, *log_decay.shape).transpose(0, 1)
    return log_decay, weight * (2 if A.is_complex() else 1)


def vandermonde(log_decay: Tensor, weight: Tensor, length: int, high: torch.dtype) -> Tensor:
    """Re sum_n weight_n exp(l log_decay_n), l < length: (d, c, length).

    With l = a T + b, decay^l = (decay^T)^a decay^b: a table of coarse powers times one of T fine ones.
    """
    size, count = tables(length)
    coarse = powers(log_decay, high, count, step=size)  # d a n
    fine = powers(log_decay, high, size)
    left = (weight.to(coarse.dtype)[:, :, None] * coarse[:, None]).flatten(1, 2)  # d ca n
    kernel = real_pairs(left) @ real_pairs(fine, conjugate=True).mT
    return kernel.view(len(kernel), -1, count * size)[..., :length]


# (numerators (d, m, n), alpha (d, n), sin, cos, l_kernel) -> (d, m, 2, k), see `cauchy`.
Sums = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


def cauchy(numerators: Tensor, alpha: Tensor, sin: Tensor, cos: Tensor, l_kernel: int) -> Tensor:
    """sum_n numerators / (cos^2 |alpha|^2 - 4 sin^2 - 4i sin cos Re alpha), real and imaginary part."""
    square = (alpha.real.square() + alpha.imag.square())[..., None]
    re = square * (cos * cos) - 4 * (sin * sin)  # d n k
    im = -4 * alpha.real[..., None] * (sin * cos)
    norm = re * re + im * im
    inverse = torch.cat([re / norm, -im / norm], -1)
    return (numerators @ inverse).unflatten(-1, (2, -1))


def dplr(
    A: Tensor,
    P: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    length: int,
    *,
    l_kernel: int,
    cauchy: Sums = cauchy,
) -> Tensor:
    """The truncated generating function at the roots of unity w = e^(-2i theta), theta = pi k / l_kernel.

    Each sum over conjugate pairs of v / (1 - w - (1 + w) alpha/2), alpha = dt A, is
        e^(i theta) [4i sin Re v - 2 cos Re(v conj(alpha))] / [cos^2 |alpha|^2 - 4 sin^2 - 4i sin cos Re alpha]
    which has no pole at w = -1. All sums share the denominator, so they are one real matrix product.
    """
    high = torch.float64 if dt.dtype == torch.float64 else torch.float32
    wide = torch.complex128 if high == torch.float64 else torch.complex64
    with torch.autocast(dt.device.type, enabled=False):
        A, P, B, C = (t.to(wide) for t in (A, P, B, C))
        dt = dt.to(high)
        rank, d, n = P.shape
        lead = C.shape[:-2]
        alpha = dt[:, None] * A
        left = torch.cat([C.reshape(-1, d, n), P.conj()]).transpose(0, 1)  # d c+r n
        right = torch.cat([B.expand(d, n)[None], P]).transpose(0, 1)  # d 1+r n
        v = left[:, :, None] * right[:, None]  # d c+r 1+r n
        numerators = torch.cat([v.real, (v * alpha.conj()[:, None, None]).real], 1).flatten(1, 2)

        theta = torch.arange(l_kernel // 2 + 1, device=dt.device, dtype=torch.float64) * (math.pi / l_kernel)
        sin, cos = torch.sin(theta).to(high), torch.cos(theta).to(high)
        sums = cauchy(numerators, alpha, sin, cos, l_kernel)
        sums = sums.view(d, 2, left.shape[1], 1 + rank, 2, -1)  # d part left right re/im k
        p, q = (torch.complex(sums[:, i, ..., 0, :], sums[:, i, ..., 1, :]) for i in (0, 1))
        turn = torch.complex(cos, sin)
        s = turn * (4j * sin * p - 2 * cos * q)  # d left right k

        h = turn.conj() * cos * dt[:, None]  # (1 + w) dt / 2
        C_B, C_P = s[:, :-rank, 0], s[:, :-rank, 1:]  # d c k and d c r k
        Q_B, Q_P = s[:, -rank:, 0], s[:, -rank:, 1:]  # d r k and d r r k
        inner = _solve(Q_P * h[:, None, None], Q_B)  # d r k
        spectrum = dt[:, None, None] * (C_B - h[:, None] * (C_P * inner[:, None]).sum(2))
        return to_kernel(spectrum, lead, length, l_kernel)


def to_kernel(spectrum: Tensor, lead: tuple[int, ...], length: int, l_kernel: int) -> Tensor:
    """(d, c, l_kernel // 2 + 1) as (*lead, d, length)."""
    kernel = torch.fft.irfft(spectrum, l_kernel)[..., :length]
    return kernel.transpose(0, 1).reshape(*lead, len(kernel), length)


def powers(log_decay: Tensor, high: torch.dtype, count: int, *, first: int = 0, step: int = 1) -> Tensor:
    """exp(log_decay (first + step k)), k < count: (d, count, d_state) in the precision of `high`.

    Exponents are never negative, so that no factor of a product overflows where the product is small.
    """
    size = 8
    if isinstance(count, torch.SymInt) or count <= 2 * size:
        return _exp(log_decay, high, first, step, count)
    fine = _exp(log_decay, high, first, step, size)
    coarse = _exp(log_decay, high, 0, step * size, -(-count // size))
    return (coarse[:, :, None] * fine[:, None]).flatten(1, 2)[:, :count]


def _exp(log_decay: Tensor, high: torch.dtype, first: int, step: int, count: int) -> Tensor:
    """Angles are taken in float64 and reduced to one turn: at 10^4 radians float32 has only three digits left."""
    at = (first + step * torch.arange(count, dtype=torch.float64, device=log_decay.device))[:, None]
    size = torch.exp(log_decay.real[:, None].to(high) * at.to(high))
    if not log_decay.is_complex():
        return size
    turns = (log_decay.imag / (2 * math.pi))[:, None] * at
    angle = (turns - turns.detach().round()).to(high) * (2 * math.pi)
    return torch.complex(size * torch.cos(angle), size * torch.sin(angle))


def real_pairs(t: Tensor, *, conjugate: bool = False) -> Tensor:
    """(..., n) complex as (..., 2n) real, so that Re(sum x y) is the product of pairs of x and of conj(y)."""
    if not t.is_complex():
        return t
    # Not t.conj(), whose gradient is a view that vmap does not know.
    return (torch.stack([t.real, -t.imag], -1) if conjugate else torch.view_as_real(t)).flatten(-2)


def tables(length: int) -> tuple[int, int]:
    """Fine and coarse powers in tables for a length; one that an exported program leaves open is one block."""
    if isinstance(length, torch.SymInt):
        return length, 1
    size = block_size(length)
    return size, -(-length // size)


def block_size(length: int) -> int:
    """Fine powers in a table: near the square root of the length, which makes both tables shortest."""
    return max(16, 1 << math.ceil(math.log2(length) / 2))


def _solve(M: Tensor, b: Tensor) -> Tensor:
    """x of (I + M) x = b for M (d, r, r, k), b (d, r, k) and r of 1 or 2."""
    if b.shape[1] == 1:
        return b / (1 + M[:, 0])
    m00, m01, m10, m11 = 1 + M[:, 0, 0], M[:, 0, 1], M[:, 1, 0], 1 + M[:, 1, 1]
    x = torch.stack([m11 * b[:, 0] - m01 * b[:, 1], m00 * b[:, 1] - m10 * b[:, 0]], 1)
    return x / (m00 * m11 - m01 * m10)[:, None]
