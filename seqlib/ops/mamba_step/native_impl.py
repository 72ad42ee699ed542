"""A Mamba layer of one token in one call."""

from __future__ import annotations

import torch

from seqlib import native

__all__ = ["mamba_step"]

native.load("cpu")
mamba_step = torch.ops.seqlib.mamba_step.default
