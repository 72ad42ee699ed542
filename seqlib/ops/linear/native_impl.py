"""A linear map of a few rows, reading the weight once with all of the machine."""

from __future__ import annotations

import torch
from torch import Tensor

from seqlib import native

__all__ = ["linear"]

native.load("cpu")
_linear = torch.ops.seqlib.linear.default


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _linear(x, weight, bias)


@torch.library.register_fake("seqlib::linear")
def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
