"""State, norm, gate and output map of one token in one call."""

from __future__ import annotations

import torch

from seqlib import native

__all__ = ["matrix_step"]

native.load("cpu")
matrix_step = torch.ops.seqlib.matrix_step.default
