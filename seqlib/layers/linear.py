"""Linear layers that read their weight at full speed when there are only a few rows to multiply."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqlib.ops.linear import FEW_ROWS, few_rows

__all__ = ["Linear"]


class Linear(nn.Linear):
    """`nn.Linear`, taking `ops.linear` for up to FEW_ROWS rows where no gradient is recorded: the case of decoding.

    It is an `nn.Linear` in every other respect, so PEFT, quantisation and checkpoints see nothing new.
    """

    def forward(self, x: Tensor) -> Tensor:
        few = x.numel() <= FEW_ROWS * self.in_features and x.dtype == self.weight.dtype
        if few and not torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type):
            return few_rows(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)
