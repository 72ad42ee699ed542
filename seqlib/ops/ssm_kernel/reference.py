"""Convolution kernels of state spaces by their recurrence."""

from __future__ import annotations

import torch
from torch import Tensor

from seqlib.ops.ssm_kernel.discretize import discretize

__all__ = ["diag", "dplr"]


def diag(A: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int, *, discretization: str) -> Tensor:
    log_decay, h = discretize(A, B, dt, discretization)
    decay = torch.exp(log_decay)
    h = h.to(torch.promote_types(h.dtype, decay.dtype))
    high = torch.float64 if dt.dtype == torch.float64 else torch.float32
    kernel = []
    for _ in range(length):
        kernel.append((2 if A.is_complex() else 1) * (C * h).sum(-1).real)
        h = decay * h
    return torch.stack(kernel, -1).to(high)


def dplr(A: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int, *, l_kernel: int) -> Tensor:
    A, P, B, C = (t.to(torch.complex128) for t in (A, P, B, C))
    n = 2 * A.shape[-1]
    both = torch.cat([P, P.conj()], -1)  # r d 2n
    state = torch.diag_embed(torch.cat([A, A.conj()], -1)) - torch.einsum("rdn,rdm->dnm", both, both.conj())
    half = dt.to(torch.float64)[:, None, None] / 2 * state
    eye = torch.eye(n, dtype=half.dtype, device=half.device)
    decay = torch.linalg.solve(eye - half, eye + half)
    h = torch.linalg.solve(eye - half, dt[:, None] * torch.cat([B, B.conj()], -1))
    readout = torch.cat([C, C.conj()], -1)  # ... d 2n, that of the truncated kernel
    whole = eye - torch.linalg.matrix_power(decay, l_kernel)
    readout = torch.linalg.solve(whole.mT, readout.unsqueeze(-1)).squeeze(-1)
    high = torch.float64 if dt.dtype == torch.float64 else torch.float32
    kernel = []
    for _ in range(length):
        kernel.append((readout * h).sum(-1).real)
        h = (decay @ h.unsqueeze(-1)).squeeze(-1)
    return torch.stack(kernel, -1).to(high)
