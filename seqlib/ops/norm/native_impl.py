"""RMSNorm by the compiled CPU kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from seqlib import native
from seqlib.ops.derivatives import once

__all__ = ["rms_norm"]

native.load("cpu")


def rms_norm(
    x: Tensor, weight: Tensor | None, *, gate: Tensor | None, norm_before_gate: bool, group_size: int | None, eps: float
) -> Tensor:
    return torch.ops.seqlib.rms_norm.default(x, weight, gate, norm_before_gate, group_size or x.shape[-1], eps)[0]


@torch.library.register_fake("seqlib::rms_norm")
def _fake(
    x: Tensor, weight: Tensor | None, gate: Tensor | None, norm_before_gate: bool, group_size: int, eps: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], x.shape[-1] // group_size), dtype=torch.float32)


@torch.library.register_fake("seqlib::rms_norm_bwd")
def _fake_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    rstd: Tensor,
    norm_before_gate: bool,
    group_size: int,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(x),
        torch.empty_like(x) if gate is not None else x.new_empty(0),
        x.new_empty(x.shape[-1] if needs_weight else 0, dtype=torch.float32),
    )


def _save(ctx, inputs, output) -> None:
    x, weight, gate, ctx.norm_before_gate, ctx.group_size, _ = inputs
    ctx.save_for_backward(x, weight, gate, output[1])
    ctx.mark_non_differentiable(output[1])


@once
def _backward(ctx, dy: Tensor, _drstd) -> tuple[Tensor | None, ...]:
    x, weight, gate, rstd = ctx.saved_tensors
    needs_weight = weight is not None and ctx.needs_input_grad[1]
    dx, dgate, dweight = torch.ops.seqlib.rms_norm_bwd.default(
        dy.contiguous(), x, weight, gate, rstd, ctx.norm_before_gate, ctx.group_size, needs_weight
    )
    return (
        dx,
        dweight.to(weight.dtype) if needs_weight else None,
        dgate if gate is not None else None,
        None,
        None,
        None,
    )


torch.library.register_autograd("seqlib::rms_norm", _backward, setup_context=_save)
