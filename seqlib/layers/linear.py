"""Linear layers that read their weight at full speed when there are only a few rows to multiply."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqlib.ops.linear import FEW_ROWS, few_rows

__all__ = ["Linear", "takes_few_rows", "unwatched"]


def takes_few_rows(layer: nn.Linear, x: Tensor) -> bool:
    """Whether `ops.linear.few_rows` may run in the layer's place: up to FEW_ROWS rows, no gradient, no autocast."""
    few = x.numel() <= FEW_ROWS * layer.in_features and x.dtype == layer.weight.dtype
    return few and not torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type)


class Linear(nn.Linear):
    """`nn.Linear`, taking `ops.linear` for up to FEW_ROWS rows where no gradient is recorded: the case of decoding.

    It is an `nn.Linear` in every other respect, so PEFT, quantisation and checkpoints see nothing new.
    """

    def forward(self, x: Tensor) -> Tensor:
        return (few_rows if takes_few_rows(self, x) else F.linear)(x, self.weight, self.bias)


def unwatched(module: nn.Module) -> bool:
    """Whether nobody would miss a call of `module`: no hooks, and no `forward` put on the instance."""
    watchers = (
        module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    )  # fmt: skip
    return not any(watchers) and "forward" not in vars(module)
