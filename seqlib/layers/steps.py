"""Parts of decoding steps that many mixers share, each in one native call where nobody wants the ops between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from seqlib import native
from seqlib.dispatch import counted, may_be_native
from seqlib.layers.linear import Linear, is_plain
from seqlib.layers.watched import watched
from seqlib.ops.linear import FEW_ROWS

__all__ = ["DTYPES", "plain", "project", "why_ops_apart"]

DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


def why_ops_apart(x: Tensor, *ops: str, device: str = "cpu", config: str = "auto") -> str | None:
    """Why `ops` run one by one on x; None if one native call may stand for them.

    Compilers, autocast, gradients, tensors of other classes (fake, distributed), and whoever asked for another backend,
    be it in a mixer's `config`, want the ops.
    """
    if torch.is_grad_enabled():
        return "gradients are enabled"
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return f"a {type(x).__name__} knows the ops only"
    if x.device.type != device:
        return f"the one call is for {device}"
    if x.dtype not in DTYPES[device]:
        return f"dtype is {x.dtype}"
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(device):
        return "a compiler or autocast wants the parts"
    if not may_be_native(*ops, config=config):
        return "another backend was asked for"
    return native.why_unavailable(device)


def project(x: Tensor, *layers: nn.Module | None) -> tuple[Any, ...]:
    """`layer(x)` of each layer, None of each None; for a few rows on a CPU all of them in one call.

    Hooks, adapters and quantised layers in the place of a `Linear` are called one by one.
    """
    there = [layer for layer in layers if layer is not None]
    maps = plain(there, x.numel() // x.shape[-1], x)
    if maps is None or why_ops_apart(x, "linear"):
        return tuple(None if layer is None else layer(x) for layer in layers)
    weights, biases = maps
    joined = torch.ops.seqlib.linears.default(x, weights, biases)
    made = joined.split_with_sizes([w.shape[0] for w in weights], -1)
    if len(there) == len(layers):
        return tuple(made)
    parts = iter(made)
    return tuple(None if layer is None else next(parts) for layer in layers)


def plain(layers: Sequence[nn.Module], rows: int, x: Tensor) -> tuple[list[Tensor], list[Tensor | None]] | None:
    """Weights and biases of linear layers whose calls on few `rows` like x are nobody's business; else None."""
    if not 0 < counted(rows) <= FEW_ROWS:
        return None
    weights: list[Tensor] = []
    biases: list[Tensor | None] = []
    for layer in layers:
        if type(layer) is not Linear or watched(layer):
            return None
        own = layer._parameters  # attributes of a module take longer to find than the rest together
        weight = own["weight"]
        if weight is None or weight.dtype != x.dtype or not is_plain(weight):
            return None
        weights.append(weight)
        biases.append(own["bias"])
    return weights, biases
