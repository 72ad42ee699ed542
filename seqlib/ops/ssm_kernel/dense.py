"""Diagonal-plus-low-rank state spaces as dense real ones, for states: chunks, steps and the truncation of C."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from seqlib.ops.ssm_kernel.torch_impl import block_size

__all__ = ["DenseSSM", "dense_final_state", "dense_state_outputs", "dplr_dense", "dplr_truncate"]


class DenseSSM(NamedTuple):
    """h_t = A h_{t-1} + B x_t, y_t = C h_t, real: A (d, n, n), B (d, n), C (..., d, n), n = 2 d_state of the pairs.

    The state is (Re h, Im h) of the complex one.
    """

    A: Tensor
    B: Tensor
    C: Tensor


def dplr_dense(A: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, l_kernel: int | None) -> DenseSSM:
    """The recurrence whose kernel `ssm_kernel_dplr` makes, in float64.

    Eigenvectors would make it diagonal, but near HiPPO-LegS they are so ill-conditioned that float32 loses the state.

    Args:
        A, P, B, C, dt: as in `ssm_kernel_dplr`.
        l_kernel: the length that C was truncated for; None if C is plain.

    Source: state-spaces/s4, models/s4/s4.py, SSMKernelDPLR (mode "dense"), in real coordinates.
    """
    A, P, B, C = (t.to(torch.complex128) for t in (A, P, B, C))
    dt = dt.to(torch.float64)[:, None, None]
    # Re and Im of (A - P P*) h, where P* acts on the pair: P* h + conj(P* h) = 2 Re(P* h).
    M = torch.cat(
        [
            torch.cat([torch.diag_embed(A.real), torch.diag_embed(-A.imag)], -1),
            torch.cat([torch.diag_embed(A.imag), torch.diag_embed(A.real)], -1),
        ],
        -2,
    )
    whole = torch.cat([P.real, P.imag], -1)  # r d 2n
    M = M - 2 * torch.einsum("rdn,rdm->dnm", whole, whole)
    eye = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
    left = eye - dt / 2 * M
    decay = torch.linalg.solve(left, eye + dt / 2 * M)
    B = B.expand_as(A)
    B_bar = torch.linalg.solve(left, dt[..., 0] * torch.cat([B.real, B.imag], -1))
    readout = 2 * torch.cat([C.real, -C.imag], -1)
    if l_kernel is not None:
        readout = _times(torch.linalg.inv(eye - torch.linalg.matrix_power(decay, l_kernel)), readout)
    return DenseSSM(decay, B_bar, readout)


def dplr_truncate(A: Tensor, P: Tensor, C: Tensor, dt: Tensor, l_kernel: int) -> Tensor:
    """The readout C (1 - A_bar^l_kernel) that `ssm_kernel_dplr` takes, from a plain C (..., d, d_state); complex128."""
    decay, _, readout = dplr_dense(A, P, torch.zeros_like(A), C, dt, None)
    eye = torch.eye(decay.shape[-1], dtype=decay.dtype, device=decay.device)
    readout = _times(eye - torch.linalg.matrix_power(decay, l_kernel), readout)
    re, im = readout.chunk(2, -1)
    return torch.complex(re, -im) / 2


def dense_state_outputs(ssm: DenseSSM, state: Tensor, length: int) -> Tensor:
    """y[l] = C A^(l+1) state for l < length: (batch, length, d) from a state (batch, d, n) and C (d, n)."""
    A, C = (t.to(state.dtype) for t in (ssm.A, ssm.C))
    size = min(length, block_size(length))
    rows = _rows(A, _times(A, C), size)  # d size n
    jump = torch.linalg.matrix_power(A, size)
    ys = []
    for _ in range(-(-length // size)):
        ys.append(torch.einsum("bdn,dln->bld", state, rows))
        state = torch.einsum("dnm,bdm->bdn", jump, state)
    return torch.cat(ys, 1)[:, :length]


def dense_final_state(ssm: DenseSSM, x: Tensor, initial_state: Tensor) -> Tensor:
    """A^length h0 + sum_l A^(length-1-l) B x[l]: (batch, d, n) from x (batch, length, d), in the dtype of the state."""
    dtype = initial_state.dtype
    A, B = ssm.A.to(dtype), ssm.B.to(dtype)
    length = x.shape[1]
    size = min(length, block_size(length))
    columns = _rows(A.mT, B, size).flip(1)  # d size n
    rest = length % size
    h = initial_state
    if rest:
        h = torch.einsum("dnm,bdm->bdn", torch.linalg.matrix_power(A, rest), h)
        h = h + torch.einsum("bld,dln->bdn", x[:, :rest].to(dtype), columns[:, size - rest :])
    parts = torch.einsum("bald,dln->abdn", x[:, rest:].to(dtype).unflatten(1, (-1, size)), columns)
    jump = torch.linalg.matrix_power(A, size)
    for part in parts:
        h = torch.einsum("dnm,bdm->bdn", jump, h) + part
    return h


def _times(A: Tensor, rows: Tensor) -> Tensor:
    """rows (..., d, n) times A (d, n, n) from the right."""
    return (rows.unsqueeze(-2) @ A).squeeze(-2)


def _rows(A: Tensor, first: Tensor, count: int) -> Tensor:
    """first A^i for i < count (d, count, n), by doubling."""
    rows = first[:, None]
    power = A
    while rows.shape[1] < count:
        rows = torch.cat([rows, rows @ power], 1)
        power = power @ power
    return rows[:, :count]
