"""The selective scan of mamba-ssm: channels first, no states in, none of the gradient out of the last state."""

from __future__ import annotations

import torch
from torch import Tensor

from seqlib.errors import UnsupportedInput
from seqlib.sequence import SequenceInfo

__all__ = ["chunked"]


def chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    seq: SequenceInfo | None,
) -> tuple[Tensor, Tensor]:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def time_last(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.movedim(1, -1).to(x.dtype)

    def wide(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.float()

    y, state = selective_scan_fn(
        time_last(x),
        time_last(dt),
        wide(A),
        time_last(B),
        time_last(C),
        D=wide(D),
        z=time_last(z),
        delta_bias=wide(dt_bias),
        delta_softplus=dt_softplus,
        return_last_state=True,
    )
    state = state.detach()
    if torch.is_grad_enabled() and y.requires_grad:
        state.requires_grad_().register_hook(_refuse)
    return y.transpose(1, 2), state


def _refuse(gradient: Tensor) -> Tensor:
    raise UnsupportedInput(
        "mamba-ssm's scan has no gradient through its final state; use backend='native' or leave the state out"
    )
