"""When one native call may stand for several ops of a decoding step, and for the step of a whole layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from seqlib import native
from seqlib.dispatch import preferred
from seqlib.layers.linear import Linear, unwatched
from seqlib.layers.norm import RMSNorm
from seqlib.layers.short_conv import ShortConv
from seqlib.mixers.base import Mixer
from seqlib.ops.linear import FEW_ROWS

__all__ = ["why_apart", "why_ops_apart"]

_PARTS = (Linear, ShortConv, RMSNorm)
_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


def why_ops_apart(mixer: Mixer, x: Tensor, state: Tensor, *ops: str, device: str = "cpu") -> str | None:
    """Why `ops` of `mixer` run one by one on x (batch, d_model); None if one native call may stand for them.

    Compilers, autocast, gradients, and whoever asked for another backend want the ops themselves; a state of another
    batch wants their error.
    """
    if torch.is_grad_enabled():
        return "gradients are enabled"
    if x.device.type != device or x.shape[:1] != state.shape[:1]:
        return f"the one call is for {device} and a state of as many rows as x"
    if x.dtype not in _DTYPES[device]:
        return f"dtype is {x.dtype}"
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(device):
        return "a compiler or autocast wants the parts"
    if not all(preferred(op, config=mixer.config.backend) in ("auto", "native") for op in ops):
        return "another backend was asked for"
    return native.why_unavailable(device)


def why_apart(
    mixer: Mixer, x: Tensor, state: Tensor, *ops: str, device: str = "cpu", norm: nn.Module | None = None
) -> str | None:
    """`why_ops_apart` for the whole layer: hooks, adapters and quantised layers in the place of a projection (or of
    `norm`, which stands before them) want the calls between its parts."""
    if x.shape[0] > FEW_ROWS:
        return f"{x.shape[0]} rows; it takes {FEW_ROWS} at most"
    for m in mixer.children() if norm is None else (norm, *mixer.children()):
        if type(m) not in _PARTS or not unwatched(m):
            return f"{type(m).__name__} is not of this library, or has hooks"
    return why_ops_apart(mixer, x, state, *ops, device=device)
