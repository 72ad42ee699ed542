"""What kernelized attention with relative positions carries from span to span: a window of tokens, or sums of all."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from seqlib.errors import UnsupportedInput
from seqlib.ops.attention.state import KVState
from seqlib.ops.rpe_attention.exponentials import Exponentials
from seqlib.sequence import State

__all__ = ["ExponentialState", "WindowState", "check_state"]


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


def check_state(
    state: WindowState | ExponentialState, q: Tensor, v: Tensor, window: int, exponentials: Exponentials | None
) -> None:
    """Raise UnsupportedInput unless the state is of the kind and the sizes of q (batch, ..., nheads, d_feature), v."""
    wanted = WindowState if exponentials is None else ExponentialState
    if not isinstance(state, wanted):
        raise UnsupportedInput(
            f"{'without' if exponentials is None else 'with'} exponentials the state is a {wanted.__name__}, "
            f"got {type(state).__name__}"
        )
    batch, nheads, d_feature, headdim = q.shape[0], *q.shape[-2:], v.shape[-1]
    if isinstance(state, WindowState):
        shapes = {"k": (batch, window, nheads, d_feature), "v": (batch, window, nheads, headdim), "length": (batch,)}
    else:
        assert exponentials is not None
        shapes = {"sums": (batch, nheads, exponentials.rates.shape[1], d_feature, headdim + 1)}
    for name, shape in shapes.items():
        if tuple(getattr(state, name).shape) != shape:
            raise UnsupportedInput(f"state.{name} must be {shape}, got {tuple(getattr(state, name).shape)}")
    if isinstance(state, WindowState) and (state.k.dtype, state.v.dtype) != (q.dtype, v.dtype):
        raise UnsupportedInput(f"the state must be {q.dtype} like q, got {state.k.dtype} and {state.v.dtype}")
