"""The long convolution by the compiled CPU kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from seqlib import native
from seqlib.ops.derivatives import once
from seqlib.ops.long_conv.documents import by_document
from seqlib.sequence import SequenceInfo

__all__ = ["long_conv"]

native.load("cpu")


def long_conv(
    x: Tensor,
    kernel: Tensor,
    *,
    D: Tensor | None,
    reverse_kernel: Tensor | None,
    initial_state: Tensor | None,
    seq: SequenceInfo | None,
) -> tuple[Tensor, Tensor | None]:
    kernel = kernel.to(torch.float32)
    skip = None if D is None else D.to(torch.float32).contiguous()
    reverse = None if reverse_kernel is None else reverse_kernel.to(torch.float32)

    def dense(u: Tensor, state: Tensor | None) -> Tensor:
        # Taps longer than the span meet zeros only.
        k = kernel if state is not None else kernel[:, : u.shape[1]]
        r = None if reverse is None else reverse[:, : u.shape[1] - 1].contiguous()
        return torch.ops.seqlib.long_conv.default(u, k.contiguous(), skip, r, state)

    y, final = by_document(dense, x, kernel.shape[1] - 1, initial_state, seq)
    return y, None if reverse is not None else final


@torch.library.register_fake("seqlib::long_conv")
def _fake(x: Tensor, kernel: Tensor, D: Tensor | None, reverse_kernel: Tensor | None, state: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("seqlib::long_conv_bwd")
def _fake_bwd(
    dy: Tensor, x: Tensor, kernel: Tensor, D: Tensor | None, reverse_kernel: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    reverse = 0 if reverse_kernel is None else reverse_kernel.shape[1]
    before = (0, 0, x.shape[2]) if state is None else state.shape
    return (
        x.new_empty(x.shape),
        kernel.new_empty(kernel.shape),
        kernel.new_empty(kernel.shape[0], reverse),
        x.new_empty(before),
    )


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


@once
def _backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, kernel, D, reverse_kernel, state = ctx.saved_tensors
    dx, dkernel, dreverse, dstate = torch.ops.seqlib.long_conv_bwd.default(dy, x, kernel, D, reverse_kernel, state)
    return (
        dx,
        dkernel,
        None if D is None else dkernel[:, 0].clone(),  # the skip is one more tap at lag 0
        None if reverse_kernel is None else dreverse,
        None if state is None else dstate,
    )


torch.library.register_autograd("seqlib::long_conv", _backward, setup_context=_save)
