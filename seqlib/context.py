"""What surrounds a call: compilers and exporters, torch.func and forward mode, autocast."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import forward_ad

__all__ = [
    "batched",
    "counted",
    "forward_mode",
    "transformed",
    "transforms",
    "undisturbed",
    "values_seen",
]

P = ParamSpec("P")
R = TypeVar("R")


def transformed() -> bool:
    """Whether torch.func or forward mode differentiates around this call."""
    return not torch.compiler.is_compiling() and bool(transforms() & {TransformType.Grad, TransformType.Jvp})


def forward_mode() -> bool:
    """Whether derivatives along a direction are taken around this call, which fused kernels do not have."""
    return not torch.compiler.is_compiling() and TransformType.Jvp in transforms()


def counted(n: int) -> int:
    """A size, for choices between implementations: one that an exported program leaves open counts as large."""
    return 1 << 20 if isinstance(n, torch.SymInt) else n


def batched() -> bool:
    """Whether torch.func.vmap runs around this call: tensors have no numbers that Python could look at."""
    return not torch.compiler.is_compiling() and TransformType.Vmap in transforms()


def values_seen() -> bool:
    """Whether Python may look at the numbers in tensors: not while a compiler traces or vmap runs."""
    return not torch.compiler.is_compiling() and not batched()


def transforms() -> set[Any]:
    """The kinds of torch.func's transforms around this call; forward mode by itself counts as its jvp."""
    found = {TransformType.Jvp} if forward_ad._current_level >= 0 else set()
    if torch._C._functorch.peek_interpreter_stack() is not None:
        found |= {level.key() for level in retrieve_all_functorch_interpreters()}
    return found


def undisturbed(function: Callable[P, R]) -> Callable[P, R]:
    """`function` as documented whatever surrounds the call: autocast would multiply its matrices in 16 bits."""

    @functools.wraps(function)
    def apart(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch._C._is_any_autocast_enabled():
            return function(*args, **kwargs)
        device = next(t.device.type for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor))
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return apart
