"""When one native call may stand for the decoding step of a whole layer."""

from __future__ import annotations

import torch
from torch import Tensor

from seqlib import native
from seqlib.dispatch import preferred
from seqlib.layers.linear import Linear
from seqlib.layers.short_conv import ShortConv
from seqlib.mixers.base import Mixer
from seqlib.ops.linear import FEW_ROWS

__all__ = ["fusible"]

_PARTS = (Linear, ShortConv)


def fusible(mixer: Mixer, x: Tensor, state: Tensor, *ops: str) -> bool:
    """Whether nobody would miss the calls between the parts of `mixer`, which run `ops` on x (batch, d_model).

    Hooks, adapters and quantised layers in the place of a projection want theirs, and so do compilers, autocast,
    gradients, and whoever asked for another backend; a state of another batch wants the error of the op.
    """
    return (
        not torch.is_grad_enabled()
        and x.shape[:1] == state.shape[:1]
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.shape[0] <= FEW_ROWS
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and all(preferred(op, config=mixer.config.backend) in ("auto", "native") for op in ops)
        and all(type(m) in _PARTS and not m._forward_hooks and not m._forward_pre_hooks for m in mixer.children())
        and native.why_unavailable("cpu") is None
    )
