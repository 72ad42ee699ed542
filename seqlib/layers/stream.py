"""The state of convolutions without a recurrence: their inputs, and in decoding, sums prepared for coming outputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from seqlib.ops.long_conv import OnlineConv, OnlineState
from seqlib.sequence import State

__all__ = ["InputsState"]


@dataclass
class InputsState(State):
    """The last inputs of a `long_conv` whose kernel has `length` lags.

    Decoding adds to it what `OnlineConv` keeps, two rings of about the same size in float32; `inputs` then stays as it
    was when decoding began, and the inputs since lie in a ring.

    Args:
        inputs: (batch, length - 1, d), oldest first.
    """

    inputs: Tensor
    online: OnlineState | None = None
    conv: OnlineConv | None = None

    def past(self) -> Tensor:
        """(batch, length - 1, d), the last inputs up to now."""
        if self.online is None or self.online.position == 0:
            return self.inputs
        t, ring = self.online.position, self.online.inputs
        new = min(t, self.inputs.shape[1])
        at = torch.arange(t - new, t, device=ring.device) % ring.shape[2]
        return torch.cat([self.inputs[:, new:], ring[..., at].transpose(1, 2).to(self.inputs.dtype)], 1)

    def step(self, x: Tensor, conv: OnlineConv) -> Tensor:
        """The output (batch, d) of `conv` for the next input (batch, d); changes this state."""
        if self.online is None or self.conv is not conv:  # the first step, or the kernel has changed
            self.inputs = self.past()
            self.online, self.conv = conv.start(self.inputs), conv
        return conv.step(x, self.online)

    def tensors(self) -> Iterator[Tensor]:
        """The inputs, in one form whether decoding has begun or not."""
        return iter([self.past()])

    @property
    def nbytes(self) -> int:
        rings = 0 if self.online is None else self.online.nbytes
        return self.inputs.numel() * self.inputs.element_size() + rings
