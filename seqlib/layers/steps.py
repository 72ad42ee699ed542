"""Projections of one input together: in decoding one call, where nobody wants to see each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from seqlib.layers.binding import bound, fusable
from seqlib.ops.linears import bind

__all__ = ["project"]


def project(x: Tensor, *layers: nn.Module | None) -> tuple[Any, ...]:
    """`layer(x)` of each layer, None of each None; in decoding all of them by `ops.linears`.

    Hooks, adapters and quantised layers in the place of a `Linear` are called one by one.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return tuple(None if layer is None else layer(x) for layer in layers)
    return bound(("project", layers), lambda: _projection(x, layers), x)(x)


def _projection(x: Tensor, layers: tuple[nn.Module | None, ...]) -> Callable[[Tensor], tuple[Any, ...]]:
    there = [layer for layer in layers if layer is not None]
    if not fusable(*there, on=x):
        return lambda x: tuple(None if layer is None else layer(x) for layer in layers)
    weights: list[Any] = [layer.weight for layer in there]
    biases: list[Any] = [layer.bias for layer in there]
    run = bind(x, weights, biases)
    if len(there) == len(layers):
        return lambda x: run(x, weights, biases)

    def with_gaps(x: Tensor) -> tuple[Any, ...]:
        parts = iter(run(x, weights, biases))
        return tuple(None if layer is None else next(parts) for layer in layers)

    return with_gaps
