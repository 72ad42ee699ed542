"""Linear attention by the state space duality of mamba-ssm: q = C, k = B, v = x dt, log_decay = A dt."""

from __future__ import annotations

import torch
from torch import Tensor

from seqlib.sequence import SequenceInfo

__all__ = ["chunked"]

_SMALLEST = 1e-6  # of a decay per token: v is divided by it


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float,
    initial_state: Tensor | None,
    causal: bool,
    chunk_size: int | None,
    seq: SequenceInfo | None,
) -> tuple[Tensor, Tensor]:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    groups = max(q.shape[2], k.shape[2])
    q, k = (t.repeat_interleave(groups // t.shape[2], 2) for t in (q, k))
    A = v.new_zeros(v.shape[2], dtype=torch.float32) if log_decay is None else log_decay.float()
    if A.dim() == 1:
        dt, x = v.new_ones(v.shape[:3], dtype=torch.float32), v
    else:
        dt = (-A).clamp(min=_SMALLEST)
        A, x = -torch.ones_like(A[0, 0]), (v / dt.unsqueeze(-1)).to(v.dtype)
    y, state = mamba_chunk_scan_combined(
        x,
        dt,
        A,
        k,
        q * scale,
        chunk_size or 256,
        initial_states=None if initial_state is None else initial_state.transpose(2, 3).float(),
        return_final_states=True,
    )
    return y, state.transpose(2, 3)
