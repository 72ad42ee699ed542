"""Time-invariant systems over a span: what a state adds to their convolution, and the state they leave."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from seqlib.ops.derivatives import recomputed
from seqlib.ops.ssm_kernel import (
    dense_final_state,
    dense_state_outputs,
    dplr_dense,
    state_outputs,
)
from seqlib.ops.ssm_kernel import final_state as diagonal_final_state
from seqlib.ops.ssm_kernel.dense import DenseSSM
from seqlib.sequence import SequenceInfo

__all__ = ["Diagonal", "LowRank", "Recurrence", "add_carried", "final_state"]


class Recurrence(Protocol):
    """h_t = A h_{t-1} + B x_t, y_t = C h_t, as functions of a whole span."""

    def outputs(self, state: Tensor, length: int) -> Tensor:
        """C A^(l+1) state for l < length: (batch, length, d)."""

    def final(self, x: Tensor) -> Tensor:
        """The state after x (batch, seqlen, d), from zero."""

    def advance(self, state: Tensor, steps: Tensor) -> Tensor:
        """A^steps[row] state, for steps (batch,)."""


@dataclass(frozen=True)
class Diagonal:
    """The recurrence of `ops.ssm_kernel.discretize`: log_decay, B_bar and C of shape (d, d_state)."""

    log_decay: Tensor
    B_bar: Tensor
    C: Tensor
    pairs: bool
    """Whether complex states stand for conjugate pairs."""

    def outputs(self, state: Tensor, length: int) -> Tensor:
        return state_outputs(self.log_decay, self.C, state, length, pairs=self.pairs)

    def final(self, x: Tensor) -> Tensor:
        return diagonal_final_state(self.log_decay, self.B_bar, x)

    def advance(self, state: Tensor, steps: Tensor) -> Tensor:
        return torch.exp(self.log_decay * steps[:, None, None]).to(state.dtype) * state


@dataclass(frozen=True)
class LowRank:
    """The recurrence of `ops.ssm_kernel_dplr`: A, B, C (d, d_state), P (rank, d, d_state), dt (d,), C truncated for
    l_kernel positions. States are complex (batch, d, d_state)."""

    A: Tensor
    P: Tensor
    B: Tensor
    C: Tensor
    dt: Tensor
    l_kernel: int

    @cached_property
    def dense(self) -> DenseSSM:
        """In float64, with the readout of the recurrence."""
        return dplr_dense(self.A, self.P, self.B, self.C, self.dt, self.l_kernel)

    def outputs(self, state: Tensor, length: int) -> Tensor:
        return dense_state_outputs(self.dense, _halves(state), length)

    def final(self, x: Tensor) -> Tensor:
        given = (self.A, self.P, self.B, self.C, self.dt, x)
        # Its dense matrices are made again in the backward pass, should anybody ask for the gradient of a state.
        return recomputed(_low_rank_final, *given)

    def advance(self, state: Tensor, steps: Tensor) -> Tensor:
        h = _halves(state)
        A = self.dense.A.to(h.dtype)
        moved = torch.empty_like(h)
        for n in steps.unique().tolist():
            rows = (steps == n).nonzero()[:, 0]
            moved = moved.index_copy(0, rows, torch.einsum("dnm,bdm->bdn", torch.linalg.matrix_power(A, n), h[rows]))
        return torch.complex(*moved.chunk(2, -1))


def _low_rank_final(A: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, x: Tensor) -> Tensor:
    ssm = dplr_dense(A, P, B, C, dt, None)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        h = dense_final_state(ssm, x, torch.zeros(x.shape[0], *ssm.B.shape, dtype=dtype, device=x.device))
    return torch.complex(*h.chunk(2, -1))


def _halves(state: Tensor) -> Tensor:
    return torch.cat([state.real, state.imag], -1)


def final_state(system: Recurrence, x: Tensor, state: Tensor | None, seq: SequenceInfo | None) -> Tensor:
    """The state (batch, ...) after the last real token of each row of x (batch, seqlen, d), from `state`; None is zero.

    A document start forgets the state and padding is as if absent, as `SequenceInfo` has it.
    """
    batch, seqlen = x.shape[:2]
    if seq is None or seq.shape is None:
        final = system.final(x)
        steps = torch.full((batch,), seqlen, device=x.device)
        return final if state is None else final + system.advance(state, steps)
    real = torch.ones(batch, seqlen, dtype=torch.bool, device=x.device)
    if seq.padding_mask is not None:
        real = seq.padding_mask
    document = torch.zeros_like(real, dtype=torch.long) if seq.document_ids is None else seq.document_ids
    last = real & (document == document[:, -1:])
    # The last document of every row, moved to the right end, zeros before it.
    order = last.long().argsort(dim=1, stable=True)
    u = x.gather(1, order[..., None].expand_as(x)).masked_fill(~last.gather(1, order)[..., None], 0)
    final = system.final(u)
    if state is None:
        return final
    forgotten = (document[:, -1] > 0).view(-1, *[1] * (state.dim() - 1))
    return final + system.advance(state, last.sum(1)).masked_fill(forgotten, 0)


def add_carried(y: Tensor, added: Tensor, seq: SequenceInfo | None) -> Tensor:
    """y (batch, seqlen, d) plus what a state adds: added[:, i] to the i-th real token of the document it belongs to."""
    added = added.to(y.dtype)
    if seq is None or seq.shape is None:
        return y + added
    added = added.gather(1, seq.positions(y.shape[0], y.shape[1], y.device)[..., None].expand_as(y))
    for elsewhere in (
        None if seq.padding_mask is None else ~seq.padding_mask,
        None if seq.document_ids is None else seq.document_ids > 0,
    ):
        added = added if elsewhere is None else added.masked_fill(elsewhere[..., None], 0)
    return y + added
