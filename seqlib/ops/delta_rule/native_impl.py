"""The delta rule by the compiled CPU kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from seqlib import native
from seqlib.sequence import SequenceInfo

__all__ = ["chunked", "step"]

native.load("cpu")
_forward = torch.ops.seqlib.delta_rule.default
_step = torch.ops.seqlib.delta_rule_step.default


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float,
    initial_state: Tensor | None,
    chunk_size: int | None,
    seq: SequenceInfo | None,
) -> tuple[Tensor, Tensor]:
    spans = None if seq is None else seq.spans
    tensors = (q, k, v, beta, log_decay, initial_state)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    y, state, _ = _forward(*tensors, spans, scale, save)
    return y, state


def step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor, scale: float
) -> Tensor:
    return _step(q, k, v, beta, log_decay, state, scale)
