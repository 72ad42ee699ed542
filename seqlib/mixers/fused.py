"""When one native call may stand for the decoding step of a whole layer."""

from __future__ import annotations

from torch import Tensor, nn

from seqlib.layers.linear import Linear, is_plain
from seqlib.layers.norm import RMSNorm
from seqlib.layers.short_conv import ShortConv
from seqlib.layers.steps import DTYPES, why_ops_apart
from seqlib.layers.watched import watched
from seqlib.mixers.base import Mixer
from seqlib.ops.linear import FEW_ROWS

__all__ = ["why_apart"]

_PARTS = (Linear, ShortConv, RMSNorm)


def why_apart(
    mixer: Mixer, x: Tensor, state: Tensor, *ops: str, device: str = "cpu", norm: nn.Module | None = None
) -> str | None:
    """Why the parts of `mixer`, which are `ops`, run one by one on x; None if one native call may stand for the layer.

    As `why_ops_apart`; and hooks, adapters and quantised layers in the place of a projection (or of `norm`, which
    stands before them) want the calls between the parts, a state of another batch their error.
    """
    if x.shape[0] > FEW_ROWS:
        return f"{x.shape[0]} rows; it takes {FEW_ROWS} at most"
    if x.shape[:1] != state.shape[:1]:
        return "the state has another number of rows than x"
    for m in mixer._modules.values() if norm is None else (norm, *mixer._modules.values()):
        if m is not None and (type(m) not in _PARTS or watched(m)):
            return f"{type(m).__name__} is not of this library, or has hooks"
        if type(m) is Linear and not is_plain(m.weight):
            return f"a weight is a {type(m.weight).__name__}"
        if type(m) is Linear and m.weight.dtype not in DTYPES[device]:
            return f"a weight is {m.weight.dtype}"
    return why_ops_apart(x, *ops, device=device, config=mixer.config.backend)
