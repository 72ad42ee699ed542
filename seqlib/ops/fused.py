"""What fused decoding steps have in common: the facts of their calls, and what their native rows do not take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from seqlib.dispatch import Facts
from seqlib.errors import UnsupportedInput
from seqlib.ops.linear import FEW_ROWS

__all__ = ["REFUSES", "few_rows_only", "is_plain", "step_facts", "writable"]

_AUTOCAST, _COMPILER = "autocast", "a compiler"
_CLASSES, _DTYPES = "tensors of other classes", "several dtypes"
REFUSES = frozenset({_AUTOCAST, _COMPILER, _CLASSES, _DTYPES})
"""Features that a native row of a fused step does not support: they want the ops one by one."""


def is_plain(tensor: Tensor) -> bool:
    """Whether native code may read `tensor`: none of the classes in which quantisers and others keep theirs."""
    return type(tensor) is nn.Parameter or type(tensor) is Tensor


def step_facts(x: Tensor, alike: Sequence[Tensor | None], *more: Tensor | None, **sizes: int) -> Facts:
    """Facts of one token x (batch, ...); `alike` are tensors that should share a dtype, `more` what else is read."""
    there = [t for t in alike if t is not None]
    every = [x, *there, *(t for t in more if t is not None)]
    asked = {
        _AUTOCAST: torch.is_autocast_enabled(x.device.type),
        _COMPILER: torch.compiler.is_compiling(),
        _CLASSES: not all(map(is_plain, every)),
        _DTYPES: len({t.dtype for t in there}) > 1,
    }
    features = frozenset(name for name, yes in asked.items() if yes)
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in every)
    return Facts(x.device.type, there[0].dtype, 1, needs_grad, features, (("rows", x.shape[0]), *sizes.items()))


def few_rows_only(facts: Facts) -> str | None:
    """The limit on the batch: beyond, matrix products are the better tool."""
    rows = facts.size("rows")
    return f"{rows} rows; it takes {FEW_ROWS} at most, where weights are read once" if rows > FEW_ROWS else None


def writable(name: str, state: Tensor, shape: tuple[int, ...], dtype: torch.dtype, *, strided: bool = False) -> None:
    """Raise UnsupportedInput unless `state` can be updated in place; `strided` if its strides may be any."""
    if tuple(state.shape) != shape or state.dtype != dtype or not (strided or state.is_contiguous()):
        order = "" if strided or state.is_contiguous() else ", not contiguous"
        raise UnsupportedInput(
            f"{name} must be {shape}, {dtype}{'' if strided else ' and contiguous'} to be updated in place, got "
            f"{tuple(state.shape)} {state.dtype}{order}"
        )
