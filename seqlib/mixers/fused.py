"""When one native call may stand for the decoding step of a whole layer."""

from __future__ import annotations

import torch
from torch import Tensor

from seqlib import native
from seqlib.dispatch import preferred
from seqlib.layers.linear import Linear, unwatched
from seqlib.layers.short_conv import ShortConv
from seqlib.mixers.base import Mixer
from seqlib.ops.linear import FEW_ROWS

__all__ = ["fusible", "native_step"]

_PARTS = (Linear, ShortConv)


def native_step(mixer: Mixer, x: Tensor, state: Tensor, *ops: str) -> bool:
    """Whether one native call may stand for `ops` of `mixer` on x (batch, d_model).

    Compilers, autocast, gradients, and whoever asked for another backend want the ops themselves; a state of another
    batch wants their error.
    """
    return (
        not torch.is_grad_enabled()
        and x.shape[:1] == state.shape[:1]
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and all(preferred(op, config=mixer.config.backend) in ("auto", "native") for op in ops)
        and native.why_unavailable("cpu") is None
    )


def fusible(mixer: Mixer, x: Tensor, state: Tensor, *ops: str) -> bool:
    """`native_step` for the whole layer: hooks, adapters and quantised layers in the place of a projection want the
    calls between its parts."""
    return (
        x.shape[0] <= FEW_ROWS
        and native_step(mixer, x, state, *ops)
        and all(type(m) in _PARTS and unwatched(m) for m in mixer.children())
    )
