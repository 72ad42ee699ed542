"""The gated readout by the compiled CPU kernel: activation, product and gate of a block of rows stay in the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from seqlib import native
from seqlib.ops.derivatives import once

__all__ = ["gelu_glu"]

native.load("cpu")
_gelu_glu = torch.ops.seqlib.gelu_glu.default
_gradients = torch.ops.seqlib.gelu_glu_bwd.default


def gelu_glu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    return _gelu_glu(x, weight, bias, keep)[0]


@torch.library.register_fake("seqlib::gelu_glu")
def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool) -> tuple[Tensor, Tensor]:
    rows = x.numel() // weight.shape[1] if keep else 0
    return x.new_empty(*x.shape[:-1], weight.shape[0] // 2), x.new_empty(rows, weight.shape[0])


@torch.library.register_fake("seqlib::gelu_glu_bwd")
def _fake_bwd(dy: Tensor, x: Tensor, weight: Tensor, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


def _save(ctx, inputs, output) -> None:
    x, weight, bias, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.has_bias = bias is not None
    ctx.mark_non_differentiable(output[1])


@once
def _backward(ctx, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    dx, dweight, dbias = _gradients(dy, *ctx.saved_tensors)
    return dx, dweight, dbias if ctx.has_bias else None, None


torch.library.register_autograd("seqlib::gelu_glu", _backward, setup_context=_save)
