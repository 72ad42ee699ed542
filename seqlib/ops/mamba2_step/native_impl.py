"""A Mamba-2 layer of one token in one call, on a GPU three kernels."""

from __future__ import annotations

import torch

from seqlib import native

__all__ = ["mamba2_step"]

native.load("cpu")
mamba2_step = torch.ops.seqlib.mamba2_step.default
