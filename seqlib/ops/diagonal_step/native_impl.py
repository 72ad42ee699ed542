"""One position of a diagonal state space in one pass over its states."""

from __future__ import annotations

import torch
from torch import Tensor

from seqlib import native

__all__ = ["diagonal_step"]

native.load("cpu")
_step = torch.ops.seqlib.diag_step.default


def diagonal_step(x: Tensor, decay: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor) -> Tensor:
    return _step(x.contiguous(), decay, B, C, D, state)
