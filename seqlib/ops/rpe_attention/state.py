"""What kernelized attention with relative positions carries from span to span: a window of tokens, or sums of all."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from seqlib.ops.attention.state import KVState
from seqlib.sequence import State

__all__ = ["ExponentialState", "WindowState"]


@dataclass
class WindowState(KVState):
    """The last tokens as features (`k`) and values in a ring of capacity = window: decoding is exact."""


@dataclass
class ExponentialState(State):
    """Sums of all tokens of the document under exponentials fitted to the bias: decoding is approximate.

    sums: (batch, nheads, n, d_feature, headdim + 1) complex64 (complex128 for float64 inputs), for each exponential
        sum_j rate^(tokens after j) phi(k_j)^T (v_j, 1). Its size does not depend on the window.
    """

    sums: Tensor
