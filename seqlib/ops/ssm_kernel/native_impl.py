"""Kernels of diagonal and of diagonal-plus-rank-one state spaces by the compiled CPU kernels."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from seqlib import native
from seqlib.ops.derivatives import once
from seqlib.ops.ssm_kernel.torch_impl import to_kernel, weights

__all__ = ["diag", "dplr"]

native.load("cpu")


def diag(A: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int, *, discretization: str) -> Tensor:
    """`torch_impl.diag` with tables of powers that exist for one channel at a time."""
    with torch.autocast("cpu", enabled=False):
        log_decay, weight = weights(A, B, C, dt, discretization)
        kernel = torch.ops.seqlib.diag_kernel.default(
            log_decay.to(torch.complex128).contiguous(), weight.to(torch.complex64).contiguous(), length
        )
        return kernel.transpose(0, 1).reshape(*C.shape[:-2], C.shape[-2], length)


def dplr(A: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int, *, l_kernel: int) -> Tensor:
    """The sums of `torch_impl.dplr` and what becomes of them, one frequency per lane, in one pass."""
    with torch.autocast("cpu", enabled=False):
        A, P, B, C = (t.to(torch.complex64) for t in (A, P, B, C))
        d, n = A.shape
        alpha = dt[:, None] * A
        left = torch.cat([C.reshape(-1, d, n), P.conj()])  # c+1 d n
        v = left[:, None] * torch.stack([B.expand(d, n), P[0]])  # c+1 2 d n
        products = torch.stack([v.real, v.real * alpha.real + v.imag * alpha.imag], 2)  # c+1 2 2 d n
        products = products.flatten(0, 2).permute(1, 2, 0).contiguous()
        square = alpha.real.square() + alpha.imag.square()
        points = l_kernel // 2 + 1
        spectrum = torch.ops.seqlib.dplr_spectrum.default(
            products, square, alpha.real.contiguous(), dt.contiguous(), *_angles(l_kernel), points
        )
        return to_kernel(torch.complex(spectrum[:, :, 0], spectrum[:, :, 1]), C.shape[:-2], length, l_kernel)


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)
def _angles(l_kernel: int) -> tuple[Tensor, Tensor]:
    """Sine and cosine of pi k / l_kernel for k <= l_kernel / 2; behind them, where nothing is wanted, of pi / 2."""
    points = l_kernel // 2 + 1
    theta = torch.full((-(-points // 16) * 16,), math.pi / 2, dtype=torch.float64)
    theta[:points] = torch.arange(points, dtype=torch.float64) * (math.pi / l_kernel)
    return theta.sin().float(), theta.cos().float()


@torch.library.register_fake("seqlib::diag_kernel")
def _fake_diag(log_decay: Tensor, weight: Tensor, length: int) -> Tensor:
    return weight.new_empty(*weight.shape[:2], length, dtype=torch.float32)


@torch.library.register_fake("seqlib::diag_kernel_bwd")
def _fake_diag_bwd(dkernel: Tensor, log_decay: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(log_decay), torch.empty_like(weight)


def _save_diag(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:2])


@once
def _diag_backward(ctx, dkernel: Tensor) -> tuple[Tensor, Tensor, None]:
    return *torch.ops.seqlib.diag_kernel_bwd.default(dkernel, *ctx.saved_tensors), None


torch.library.register_autograd("seqlib::diag_kernel", _diag_backward, setup_context=_save_diag)


@torch.library.register_fake("seqlib::dplr_spectrum")
def _fake(weights: Tensor, square: Tensor, real: Tensor, dt: Tensor, sin: Tensor, cos: Tensor, points: int) -> Tensor:
    return weights.new_empty(weights.shape[0], weights.shape[2] // 4 - 1, 2, points)


@torch.library.register_fake("seqlib::dplr_spectrum_bwd")
def _fake_bwd(
    dspectrum: Tensor, weights: Tensor, square: Tensor, real: Tensor, dt: Tensor, sin: Tensor, cos: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(weights), torch.empty_like(square), torch.empty_like(real), torch.empty_like(dt)
    )  # fmt: skip


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:6])


@once
def _backward(ctx, dspectrum: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.seqlib.dplr_spectrum_bwd.default(dspectrum, *ctx.saved_tensors), None, None, None


torch.library.register_autograd("seqlib::dplr_spectrum", _backward, setup_context=_save)
