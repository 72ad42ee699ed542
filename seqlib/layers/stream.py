"""The state of convolutions without a recurrence: their inputs, and in decoding, sums prepared for coming outputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from seqlib.ops.long_conv import OnlineConv, OnlineState, SparseConv, SparseState
from seqlib.sequence import State

__all__ = ["InputsState"]


@dataclass
class InputsState(State):
    """The last inputs of a `long_conv` whose kernel has `length` lags.

    Decoding adds to it what `OnlineConv` or `SparseConv` keeps, rings of about twice the size in float32; `inputs` then
    stays as it was when decoding began, and the inputs since lie in a ring.

    Args:
        inputs: (batch, length - 1, d), oldest first.
    """

    inputs: Tensor
    online: OnlineState | SparseState | None = None
    conv: OnlineConv | SparseConv | None = None

    def past(self) -> Tensor:
        """(batch, length - 1, d), the last inputs up to now."""
        if self.online is None or self.online.position == 0:
            return self.inputs
        new = min(self.online.position, self.inputs.shape[1])
        return torch.cat([self.inputs[:, new:], self.online.last(new).to(self.inputs.dtype)], 1)

    def step(self, x: Tensor, conv: OnlineConv | SparseConv) -> Tensor:
        """The output (batch, d) of `conv` for the next input (batch, d); changes this state."""
        if self.online is None or self.conv is not conv:  # the first step, or the kernel has changed
            self.inputs = self.past()
            self.online, self.conv = conv.start(self.inputs), conv
        return conv.step(x, self.online)  # type: ignore[arg-type]

    def tensors(self) -> Iterator[Tensor]:
        """The inputs, in one form whether decoding has begun or not."""
        return iter([self.past()])

    @property
    def nbytes(self) -> int:
        rings = 0 if self.online is None else self.online.nbytes
        return self.inputs.numel() * self.inputs.element_size() + rings
