"""Diagonal-plus-low-rank state spaces as dense real ones, for states: chunks, steps and the truncation of C."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from seqlib.context import undisturbed
from seqlib.ops.ssm_kernel.torch_impl import block_size

__all__ = ["DenseSSM", "dense_final_state", "dense_state_outputs", "dplr_dense", "dplr_recurrence", "dplr_truncate"]


class DenseSSM(NamedTuple):
    """h_t = A h_{t-1} + B x_t, y_t = C h_t, real: A (d, n, n), B (d, n), C (..., d, n), n = 2 d_state of the pairs.

    The state is (Re h, Im h) of the complex one.
    """

    A: Tensor
    B: Tensor
    C: Tensor


class LowRankStep(NamedTuple):
    """h_t = decay h_{t-1} - sum_i q_i Re(r_i . h_{t-1}) + B_bar x_t; complex decay, B_bar (d, n), q, r (rank, d, n)."""

    decay: Tensor
    q: Tensor
    r: Tensor
    B_bar: Tensor


def dplr_recurrence(A: Tensor, P: Tensor, B: Tensor, dt: Tensor) -> LowRankStep:
    """The bilinear step of diag(A) - P P* over conjugate pairs in O(n), in float64, by Woodbury's identity.

    With m = 1 / (1 - dt/2 A):  decay = m (1 + dt/2 A),  q = dt/2 m P,  G = 1 + 2 Re(P* q),
    r = G^-1 2 P* (1 + decay),  B_bar = dt m B - q G^-1 2 Re(P* dt m B).

    Args:
        A, P, B, dt: as in `ssm_kernel_dplr`.
    """
    A, P, B = (t.to(torch.complex128) for t in (A, P, B))
    half = dt.to(torch.float64)[:, None] / 2
    m = 1 / (1 - half * A)
    decay, q, B_bar = m * (1 + half * A), half * m * P, 2 * half * m * B
    eye = torch.eye(P.shape[0], dtype=half.dtype, device=half.device)
    G = eye + 2 * torch.einsum("rdn,sdn->drs", P.conj(), q).real
    left = torch.einsum("drs,sdn->rdn", torch.linalg.inv(G).to(P.dtype), 2 * P.conj())
    B_bar = B_bar - (q * (left * B_bar).sum(-1, keepdim=True).real).sum(0)
    return LowRankStep(decay, q, left * (1 + decay), B_bar)


def dplr_dense(A: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, l_kernel: int | None) -> DenseSSM:
    """The recurrence whose kernel `ssm_kernel_dplr` makes, in float64.

    Eigenvectors would make it diagonal, but near HiPPO-LegS they are so ill-conditioned that float32 loses the state.

    Args:
        A, P, B, C, dt: as in `ssm_kernel_dplr`.
        l_kernel: the length that C was truncated for; None if C is plain.

    Source: state-spaces/s4, models/s4/s4.py, SSMKernelDPLR (mode "dense"), in real coordinates.
    """
    decay, q, r, B_bar = dplr_recurrence(A, P, B, dt)
    C = C.to(torch.complex128)
    A_bar = torch.cat(
        [
            torch.cat([torch.diag_embed(decay.real), torch.diag_embed(-decay.imag)], -1),
            torch.cat([torch.diag_embed(decay.imag), torch.diag_embed(decay.real)], -1),
        ],
        -2,
    )
    A_bar = A_bar - torch.einsum("rdn,rdm->dnm", torch.cat([q.real, q.imag], -1), torch.cat([r.real, -r.imag], -1))
    readout = 2 * torch.cat([C.real, -C.imag], -1)
    if l_kernel is not None:
        eye = torch.eye(A_bar.shape[-1], dtype=A_bar.dtype, device=A_bar.device)
        readout = _times(torch.linalg.inv(eye - torch.linalg.matrix_power(A_bar, l_kernel)), readout)
    return DenseSSM(A_bar, torch.cat([B_bar.real, B_bar.imag], -1), readout)


def dplr_truncate(A: Tensor, P: Tensor, C: Tensor, dt: Tensor, l_kernel: int) -> Tensor:
    """The readout C (1 - A_bar^l_kernel) that `ssm_kernel_dplr` takes, from a plain C (..., d, d_state); complex128."""
    decay, _, readout = dplr_dense(A, P, torch.zeros_like(A), C, dt, None)
    eye = torch.eye(decay.shape[-1], dtype=decay.dtype, device=decay.device)
    readout = _times(eye - torch.linalg.matrix_power(decay, l_kernel), readout)
    re, im = readout.chunk(2, -1)
    return torch.complex(re, -im) / 2


@undisturbed
def dense_state_outputs(ssm: DenseSSM, state: Tensor, length: int) -> Tensor:
    """y[l] = C A^(l+1) state for l < length: (batch, length, d) from a state (batch, d, n) and C (d, n)."""
    A, C = (t.to(state.dtype) for t in (ssm.A, ssm.C))
    size = min(length, block_size(length))
    rows, _ = _rows(A, _times(A, C), size)  # d size n
    jump = torch.linalg.matrix_power(A, size)
    ys = []
    for _ in range(-(-length // size)):
        ys.append(torch.einsum("bdn,dln->bld", state, rows))
        state = torch.einsum("dnm,bdm->bdn", jump, state)
    return torch.cat(ys, 1)[:, :length]


@undisturbed
def dense_final_state(ssm: DenseSSM, x: Tensor, initial_state: Tensor) -> Tensor:
    """A^length h0 + sum_l A^(length-1-l) B x[l]: (batch, d, n) from x (batch, length, d), in the dtype of the state."""
    dtype = initial_state.dtype
    A, B = ssm.A.to(dtype), ssm.B.to(dtype)
    length = x.shape[1]
    size = min(length, block_size(length))
    rows, power = _rows(A.mT, B, size)
    columns = rows.flip(1)  # d size n
    rest = length % size
    h = initial_state
    if rest:
        h = torch.einsum("dnm,bdm->bdn", torch.linalg.matrix_power(A, rest), h)
        h = h + torch.einsum("bld,dln->bdn", x[:, :rest].to(dtype), columns[:, size - rest :])
    parts = torch.einsum("bald,dln->abdn", x[:, rest:].to(dtype).unflatten(1, (-1, size)), columns)
    jump = power.mT if size & (size - 1) == 0 else torch.linalg.matrix_power(A, size)
    for part in parts:
        h = torch.einsum("dnm,bdm->bdn", jump, h) + part
    return h


def _times(A: Tensor, rows: Tensor) -> Tensor:
    """rows (..., d, n) times A (d, n, n) from the right."""
    return (rows.unsqueeze(-2) @ A).squeeze(-2)


def _rows(A: Tensor, first: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """first A^i for i < count (d, count, n), by doubling, and A to the power of two from `count` upwards."""
    rows = first[:, None]
    power = A
    while rows.shape[1] < count:
        rows = torch.cat([rows, rows @ power], 1)
        power = power @ power
    return rows[:, :count], power
