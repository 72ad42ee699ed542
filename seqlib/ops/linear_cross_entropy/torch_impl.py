"""Cross entropy of a linear map in torch, some rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqlib.ops.derivatives import once

__all__ = ["Shape", "linear_cross_entropy", "over_chunks"]

LOGITS = {"cpu": 1 << 24, "cuda": 1 << 28}
"""Logits held at a time, in elements: what stays near the processor, or what keeps many of them busy."""


class Shape(NamedTuple):
    """What is done to logits before the softmax."""

    scale: float
    softcap: float | None


# (logits, targets, divisor, ignore_index, shape, needs_gradient) -> sum of the losses and, where it is needed, the
# gradient of the logits; may write into the logits.
Losses = Callable[[Tensor, Tensor, Tensor, int, Shape, bool], tuple[Tensor, Tensor | None]]


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    divisor: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float | None,
) -> Tensor:
    return over_chunks(_losses, x, weight, targets, divisor, ignore_index, Shape(scale, softcap))


def over_chunks(
    losses: Losses, x: Tensor, weight: Tensor, targets: Tensor, divisor: Tensor, ignore_index: int, shape: Shape
) -> Tensor:
    return _Chunks.apply(losses, x, weight, targets, divisor, ignore_index, shape)


def _losses(
    logits: Tensor, targets: Tensor, divisor: Tensor, ignore_index: int, shape: Shape, needs_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    dtype, high = logits.dtype, torch.promote_types(logits.dtype, torch.float32)
    scored = targets != ignore_index
    logits = logits.to(high) if shape.scale == 1 else logits.to(high) * shape.scale
    if shape.softcap is not None:
        logits = shape.softcap * torch.tanh(logits / shape.softcap)
    log_z = logits.logsumexp(-1, keepdim=True)
    index = torch.where(scored, targets, 0).unsqueeze(-1)
    total = ((log_z - logits.gather(-1, index)).squeeze(-1) * scored).sum()
    if not needs_gradient:
        return total, None
    dlogits = (logits - log_z).exp_()
    dlogits.scatter_add_(-1, index, dlogits.new_full((1, 1), -1.0).expand_as(index))
    dlogits = dlogits.mul_(scored.unsqueeze(-1)).div_(divisor / shape.scale)
    if shape.softcap is not None:
        dlogits *= 1 - (logits / shape.softcap).square()
    return total, dlogits.to(dtype)


class _Chunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        losses: Losses,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        divisor: Tensor,
        ignore_index: int,
        shape: Shape,
    ) -> Tensor:
        high = torch.float64 if x.dtype == torch.float64 else torch.float32
        chunk = max(1, LOGITS.get(x.device.type, LOGITS["cuda"]) // weight.shape[0])
        total = x.new_zeros((), dtype=high)
        needs_x, needs_weight = ctx.needs_input_grad[1:3]
        dx = torch.zeros_like(x) if needs_x else None
        dweight = torch.zeros_like(weight, dtype=high) if needs_weight else None
        for begin in range(0, x.shape[0], chunk):
            part = x[begin : begin + chunk].to(weight.dtype)
            target = targets[begin : begin + chunk]
            loss, dlogits = losses(part @ weight.t(), target, divisor, ignore_index, shape, needs_x or needs_weight)
            total += loss
            if dlogits is None:
                continue
            if dx is not None:
                dx[begin : begin + chunk] = dlogits @ weight
            if dweight is not None:
                dweight += dlogits.t() @ part
        ctx.save_for_backward(dx, None if dweight is None else dweight.to(weight.dtype))
        return total / divisor

    @staticmethod
    @once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(None if t is None else t * grads[0].to(t.dtype) for t in ctx.saved_tensors), *(None,) * 4
