"""Kernels of state spaces by the compiled CUDA kernels: powers and reciprocals exist only where they are summed."""

from __future__ import annotations

import torch
from torch import Tensor

from seqlib import native
from seqlib.ops.derivatives import once
from seqlib.ops.ssm_kernel import torch_impl
from seqlib.ops.ssm_kernel.torch_impl import block_size, powers, real_pairs

__all__ = ["diag", "dplr"]

native.load("cpu")  # holds the schemas
_vandermonde = torch.ops.seqlib.vandermonde.default
_cauchy = torch.ops.seqlib.cauchy.default
_cauchy_gradients = torch.ops.seqlib.cauchy_bwd.default


def diag(A: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int, *, discretization: str) -> Tensor:
    with torch.autocast(dt.device.type, enabled=False):
        log_decay, weight = torch_impl.weights(A, B, C, dt, discretization)
        kernel = _vandermonde(log_decay.to(torch.complex128), weight.to(torch.complex64).contiguous(), length)
        return kernel.transpose(0, 1).reshape(*C.shape[:-2], C.shape[-2], length)


def dplr(A: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int, *, l_kernel: int) -> Tensor:
    def sums(numerators: Tensor, alpha: Tensor, sin: Tensor, cos: Tensor, l_kernel: int) -> Tensor:
        return _cauchy(numerators.contiguous(), alpha.contiguous(), l_kernel)

    return torch_impl.dplr(A, P, B, C, dt, length, l_kernel=l_kernel, cauchy=sums)


@torch.library.register_fake("seqlib::vandermonde")
def _fake_vandermonde(log_decay: Tensor, weight: Tensor, length: int) -> Tensor:
    return weight.new_empty(*weight.shape[:2], length, dtype=torch.float32)


@torch.library.register_fake("seqlib::cauchy")
def _fake_cauchy(numerators: Tensor, alpha: Tensor, l_kernel: int) -> Tensor:
    return numerators.new_empty(*numerators.shape[:2], 2, l_kernel // 2 + 1)


@torch.library.register_fake("seqlib::cauchy_bwd")
def _fake_cauchy_bwd(dsums: Tensor, numerators: Tensor, alpha: Tensor, l_kernel: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(numerators), numerators.new_empty(*alpha.shape, 2)


def _save_vandermonde(ctx, inputs, output) -> None:
    log_decay, weight, ctx.length = inputs
    ctx.save_for_backward(log_decay, weight)


@once
def _vandermonde_backward(ctx, dkernel: Tensor) -> tuple[Tensor, Tensor, None]:
    """With l = a T + b:  dweight = sum_l conj(decay^l) dK_l,  dlog_decay = conj(weight) sum_l l conj(decay^l) dK_l."""
    log_decay, weight = ctx.saved_tensors
    size = block_size(ctx.length)
    count = -(-ctx.length // size)
    coarse = powers(log_decay, torch.float32, count, step=size).conj()  # d a n
    fine = real_pairs(powers(log_decay, torch.float32, size), conjugate=True)  # d b 2n
    at = torch.arange(size, device=fine.device, dtype=torch.float32)[:, None]
    dkernel = torch.nn.functional.pad(dkernel, (0, count * size - ctx.length)).unflatten(-1, (count, size))
    both = dkernel.flatten(1, 2) @ torch.cat([fine, at * fine], -1)  # d ca 4n
    parts = torch.view_as_complex(both.view(len(both), -1, count, 2, log_decay.shape[1], 2))  # d c a 2 n
    first = (coarse[:, None] * parts[:, :, :, 0]).sum(2)
    places = size * torch.arange(count, device=fine.device, dtype=torch.float32)[:, None]
    second = (coarse[:, None] * (parts[:, :, :, 1] + places * parts[:, :, :, 0])).sum(2)
    return (weight.conj() * second).sum(1).to(log_decay.dtype), first, None


def _save_cauchy(ctx, inputs, output) -> None:
    numerators, alpha, ctx.l_kernel = inputs
    ctx.save_for_backward(numerators, alpha)


@once
def _cauchy_backward(ctx, dsums: Tensor) -> tuple[Tensor, Tensor, None]:
    dnumerators, dalpha = _cauchy_gradients(dsums, *ctx.saved_tensors, ctx.l_kernel)
    return dnumerators, torch.view_as_complex(dalpha), None


torch.library.register_autograd("seqlib::vandermonde", _vandermonde_backward, setup_context=_save_vandermonde)
torch.library.register_autograd("seqlib::cauchy", _cauchy_backward, setup_context=_save_cauchy)
