"""Several linear maps, one by one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from seqlib.ops.linear import linear

__all__ = ["linears"]


def linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    return tuple(linear(x, weight, bias) for weight, bias in zip(weights, biases))
