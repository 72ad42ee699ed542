"""Long convolutions one input at a time, in O(log^2 length) amortised operations per channel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seqlib.context import undisturbed
from seqlib.errors import UnsupportedInput
from seqlib.sequence import State

__all__ = ["OnlineConv", "OnlineState"]

# Tiles up to this many inputs are plain sums: a transform would cost more.
DIRECT = 32


@dataclass
class OnlineState(State):
    """inputs: (batch, d, capacity), the last inputs, and pending: (batch, d, capacity), what past inputs already
    contribute to the coming outputs; both rings over the position, float32 (float64 for float64 kernels)."""

    inputs: Tensor
    pending: Tensor
    position: int = 0

    def last(self, count: int) -> Tensor:
        """The last `count` inputs since the start, (batch, count, d)."""
        at = torch.arange(self.position - count, self.position, device=self.inputs.device) % self.inputs.shape[2]
        return self.inputs[..., at].transpose(1, 2)


class OnlineConv:
    """A causal `long_conv` with a fixed kernel whose inputs arrive one by one, because each depends on the last output.

        y[t] = D x[t] + sum_j kernel[:, j] x[t - j]

    Before output t, with u the largest power of two that divides t, the inputs t-u .. t-1 are added to the outputs
    t .. t+u-1 in one product of transforms: every pair (input, output) is met exactly once. Tiles end at the length of
    the kernel, so memory does not grow however many positions are generated.

    Args:
        kernel: (d, length).
        D: (d,) or None.

    Source: Oncescu et al. 2024 (Flash Inference, arXiv 2410.12982), algorithm 2, after van der Hoeven's relaxed
    multiplication.
    """

    def __init__(self, kernel: Tensor, D: Tensor | None = None) -> None:
        if kernel.dim() != 2 or 0 in kernel.shape:
            raise UnsupportedInput(f"kernel must have shape (d, length >= 1), got {tuple(kernel.shape)}")
        kernel = kernel.detach()
        self.kernel = kernel.to(torch.float64 if kernel.dtype == torch.float64 else torch.float32)
        self.first = self.kernel[:, 0] if D is None else self.kernel[:, 0] + D.detach().to(self.kernel.dtype)
        self.capacity = 1 << (self.kernel.shape[1] - 1).bit_length()
        self._tiles: dict[int, Tensor] = {}

    @torch.no_grad()
    def start(self, past: Tensor) -> OnlineState:
        """The state after the inputs `past` (batch, any number, d), oldest first, as `long_conv` returns them."""
        length = self.kernel.shape[1]
        u = past[:, max(0, past.shape[1] - length + 1) :].to(self.kernel.dtype).transpose(1, 2)
        pending = u.new_zeros(*u.shape[:2], self.capacity)
        if u.shape[2] and length > 1:
            n = u.shape[2] + length - 1
            full = torch.fft.irfft(torch.fft.rfft(u, 2 * n) * torch.fft.rfft(self.kernel, 2 * n), 2 * n)
            coming = full[..., u.shape[2] : u.shape[2] + length - 1]
            pending[..., : coming.shape[2]] = coming
        return OnlineState(torch.zeros_like(pending), pending)

    @undisturbed
    @torch.no_grad()
    def step(self, x: Tensor, state: OnlineState) -> Tensor:
        """The output (batch, d) for the next input (batch, d); **writes into `state`**."""
        t, at = state.position, state.position % self.capacity
        if t:
            self._flush(state, min(t & -t, self.capacity))
        u = x.to(self.kernel.dtype)
        y = state.pending[..., at] + self.first * u
        state.pending[..., at] = 0
        state.inputs[..., at] = u
        state.position = t + 1
        return y.to(x.dtype)

    def _flush(self, state: OnlineState, size: int) -> None:
        """Add the last `size` inputs to the next `size` outputs."""
        if self.kernel.shape[1] == 1:
            return
        here = state.position % self.capacity
        # Tiles are aligned to their size, so neither of them wraps round.
        u = state.inputs[..., (here - size) % self.capacity :][..., :size]
        out = state.pending[..., here : here + size]
        tile = self._tiles.get(size)
        if tile is None:
            tile = self._tiles[size] = self._tile(size)
        if size <= DIRECT:
            out += torch.einsum("bdi,dio->bdo", u, tile)
        else:
            # Of the 2 size samples of the circular product the first size - 1 hold what wraps round.
            out += torch.fft.irfft(torch.fft.rfft(u, 2 * size) * tile, 2 * size)[..., size:]

    def _tile(self, size: int) -> Tensor:
        """Lags 1 .. 2 size - 1 as a spectrum, or as a matrix (d, input, output)."""
        lags = torch.nn.functional.pad(self.kernel, (0, max(0, 2 * size - self.kernel.shape[1])))[:, : 2 * size]
        if size <= DIRECT:
            i = torch.arange(size, device=lags.device)
            return lags[:, size + i[None, :] - i[:, None]]
        return torch.fft.rfft(lags)
