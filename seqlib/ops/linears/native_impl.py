"""Several linear maps of a few rows in one call, which fills one output."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from seqlib import native

__all__ = ["linears"]

native.load("cpu")
_linears = torch.ops.seqlib.linears.default


def linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    return tuple(_linears(x, weights, biases).split_with_sizes([w.shape[0] for w in weights], -1))
