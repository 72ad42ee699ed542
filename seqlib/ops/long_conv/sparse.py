"""Long convolutions with kernels of straight pieces, one input at a time, in as many operations as there are bends."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seqlib.errors import UnsupportedInput
from seqlib.sequence import State

__all__ = ["SparseConv", "SparseState"]


@dataclass
class SparseState(State):
    """sums: (batch, length + 2, d), a ring over the position of the double running sums of the inputs; slope: (batch,
    d), the running sum of the last input. Both float64."""

    sums: Tensor
    slope: Tensor
    position: int = 0

    def last(self, count: int) -> Tensor:
        """The last `count` inputs (batch, count, d): second differences of their double sums."""
        at = torch.arange(self.position - count - 2, self.position, device=self.sums.device)
        return self.sums[:, at % self.sums.shape[1]].diff(n=2, dim=1)


class SparseConv:
    """A causal `long_conv` whose inputs arrive one by one, for a kernel that is made of few straight pieces.

        y[t] = D x[t] + sum_j bend[:, j] s[t - j],  bend[j] = kernel[j] - 2 kernel[j-1] + kernel[j-2],
        s the double running sum of x: summation by parts, twice

    Bends are mostly 0. They add up to 0, and so do they weighted by j, so an affine function of t may be taken off s at
    any time: once per length of the kernel it is, lest s grow like t^2. With it s stays below length^2 max|x|, and
    float64 leaves errors of about 1e-16 of that.

    Args:
        kernel: (d, length), straight to about 1e-12 of its size between bends; make it in float64.
        D: (d,) or None.
    """

    def __init__(self, kernel: Tensor, D: Tensor | None = None) -> None:
        if kernel.dim() != 2 or 0 in kernel.shape:
            raise UnsupportedInput(f"kernel must have shape (d, length >= 1), got {tuple(kernel.shape)}")
        wide = kernel.detach().to(torch.float64)
        bends = torch.nn.functional.pad(wide, (2, 2)).diff(n=2)  # d length+2
        self.length = wide.shape[1]
        self.taps = (bends.abs() > 1e-11 * wide.abs().amax(1, keepdim=True)).any(0).nonzero()[:, 0]
        self.weights = bends[:, self.taps].T.contiguous()  # taps d
        self.D = None if D is None else D.detach().to(torch.float64)

    @torch.no_grad()
    def start(self, past: Tensor) -> SparseState:
        """The state after the inputs `past` (batch, any number, d), oldest first, as `long_conv` returns them."""
        batch, _, d = past.shape
        u = past[:, max(0, past.shape[1] - self.length + 1) :].to(torch.float64)
        room = u.new_zeros(batch, self.length + 2 - u.shape[1], d)
        sums = torch.cat([room, u], 1).cumsum(1)
        return SparseState(sums.cumsum(1), sums[:, -1].clone())

    @torch.no_grad()
    def step(self, x: Tensor, state: SparseState) -> Tensor:
        """The output (batch, d) for the next input (batch, d); **writes into `state`**."""
        u, size, t = x.to(torch.float64), state.sums.shape[1], state.position
        state.slope += u
        state.sums[:, t % size] = state.sums[:, (t - 1) % size] + state.slope
        y = (state.sums[:, (t - self.taps) % size] * self.weights).sum(1)
        if self.D is not None:
            y = y + self.D * u
        state.position = t + 1
        if state.position % self.length == 0:
            age = (t - torch.arange(size, device=x.device)) % size
            state.sums -= state.sums[:, t % size, None] - age[:, None] * state.slope[:, None]
            state.slope.zero_()
        return y.to(x.dtype)
