"""The long convolution through torch's FFT, in blocks of channels."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from seqlib.ops.derivatives import recomputed
from seqlib.ops.long_conv.documents import by_document
from seqlib.sequence import SequenceInfo

__all__ = ["fast_length", "long_conv", "step"]

# Numbers in one transform. Larger temporaries are returned to the system after each use and faulted in again.
BLOCK = 1 << 23


def long_conv(
    x: Tensor,
    kernel: Tensor,
    *,
    D: Tensor | None,
    reverse_kernel: Tensor | None,
    initial_state: Tensor | None,
    seq: SequenceInfo | None,
) -> tuple[Tensor, Tensor | None]:
    high = torch.float64 if x.dtype == torch.float64 else torch.float32
    kernel = kernel.to(high)
    if D is not None:  # the skip is one more tap at lag 0
        kernel = torch.cat([kernel[:, :1] + D.to(high)[:, None], kernel[:, 1:]], 1)
    reverse = None if reverse_kernel is None else reverse_kernel.to(high)
    y, final = by_document(
        lambda u, state: _dense(u, kernel, reverse, state), x, kernel.shape[1] - 1, initial_state, seq
    )
    return y, None if reverse is not None else final


def step(x: Tensor, kernel: Tensor, state: Tensor, *, D: Tensor | None) -> Tensor:
    high = torch.float64 if x.dtype == torch.float64 else torch.float32
    seen = torch.cat([state, x[:, None]], 1)
    y = (seen.to(high) * kernel.to(high).flip(1).T).sum(1)
    if D is not None:
        y = y + D.to(high) * x.to(high)
    state.copy_(seen[:, 1:])
    return y.to(x.dtype)


def _dense(x: Tensor, kernel: Tensor, reverse: Tensor | None, state: Tensor | None) -> Tensor:
    batch, seqlen, d = x.shape
    width = max(1, BLOCK // (2 * batch * (seqlen + (0 if state is None else state.shape[1]))))
    count = -(-d // width)
    pieces = zip(
        x.split(width, 2),
        kernel.split(width),
        [None] * count if reverse is None else reverse.split(width),
        [None] * count if state is None else state.split(width, 2),
    )
    # The spectra of a block are twice its inputs.
    return torch.cat([recomputed(_block, *given) for given in pieces], 2)


def _block(x: Tensor, kernel: Tensor, reverse: Tensor | None, state: Tensor | None) -> Tensor:
    seqlen = x.shape[1]
    u = (x if state is None else torch.cat([state, x], 1)).to(kernel.dtype).transpose(1, 2)  # b d l
    kernel = kernel[:, : u.shape[2]]
    before = u.shape[2] - seqlen
    # What a circular convolution wraps round must fall outside the outputs: onto the `before` first ones, which nobody
    # wants, or onto zeros.
    n = u.shape[2] if before else seqlen + kernel.shape[1] - 1
    if reverse is not None:
        reverse = reverse[:, : seqlen - 1]
        n = max(n, seqlen + reverse.shape[1])
    n = fast_length(n)
    if reverse is not None:  # lag -1 is the last sample
        gap = kernel.new_zeros(kernel.shape[0], n - kernel.shape[1] - reverse.shape[1])
        kernel = torch.cat([kernel, gap, reverse.flip(1)], 1)
    spectrum = torch.fft.rfft(u, n) * torch.fft.rfft(kernel, n)
    y = torch.fft.irfft(spectrum, n)[..., before : before + seqlen]
    return y.transpose(1, 2).to(x.dtype)


@functools.cache
def fast_length(n: int) -> int:
    """The smallest even 2^a 3^b 5^c >= n, or the power of two above n if that is at most a quarter larger."""
    power = 1 << max(1, (n - 1).bit_length())
    if 4 * power <= 5 * n:
        return power
    best = power
    odd5 = 1
    while odd5 < best:
        odd = odd5
        while odd < best:
            need = -(-n // odd)
            best = min(best, odd << max(1, (need - 1).bit_length()))
            odd *= 3
        odd5 *= 5
    return best
