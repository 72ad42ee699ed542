"""Backward passes that are written by hand, and those that make intermediate results again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from seqlib.context import transformed, undisturbed
from seqlib.errors import UnsupportedInput

__all__ = ["once", "recomputed"]


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """`backward` of an op's row, refusing to be differentiated: autograd would take its results for constants.

    torch.autograd.function.once_differentiable does not say so where the incoming gradient is a constant.
    """
    op, run = backward.__module__.split(".")[2], undisturbed(backward)

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise UnsupportedInput(
                f"this row of {op} has first derivatives only, and create_graph=True asks for more; "
                "compute it under seqlib.use_backend('reference')"
            )
        return run(ctx, *grads)

    return checked


def recomputed(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), made again in the backward pass instead of kept for it; kept under torch.func, which has to."""
    if not torch.is_grad_enabled() or transformed():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
