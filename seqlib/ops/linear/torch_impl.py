"""A linear map by torch's matrix product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from seqlib import cpu

__all__ = ["linear", "product"]

PANEL = 2**20
"""Numbers of a weight that are widened at a time: 4 MB, few enough to stay in a cache, enough for a fast product."""
_HALF = (torch.bfloat16, torch.float16)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return product(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`; where the CPU has no 16-bit products and the result is only looked at, by `_widened`."""
    if x.dtype in _HALF and x.device.type == "cpu" and not cpu.multiplies(x.dtype):
        given = [t for t in (x, weight, bias) if t is not None]
        if all(t.dtype == x.dtype and type(t) in (Tensor, nn.Parameter) for t in given) and not (
            (torch.is_grad_enabled() and any(t.requires_grad for t in given))
            or torch.is_autocast_enabled("cpu")
            or torch.compiler.is_compiling()
            or torch._C._functorch.peek_interpreter_stack() is not None
            or forward_ad._current_level >= 0
        ):
            return _widened(x, weight, bias)
    return F.linear(x, weight, bias)


def _widened(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In float32, panel by panel of the weight: reads half the bytes of a float32 weight and rounds once."""
    d_out, d_in = weight.shape
    y = x.new_empty(*x.shape[:-1], d_out)
    rows = (x.flatten(0, -2) if x.dim() > 1 else x[None]).float()
    count, results = rows.shape[0], y.view(rows.shape[0], d_out)
    added = None if bias is None else bias.float()
    panels = max(1, -(-weight.numel() // PANEL))
    step = min(d_out, -(-d_out // (16 * panels)) * 16)  # even panels of whole vectors
    panel, product = rows.new_empty(step, d_in), rows.new_empty(count * step)
    for first in range(0, d_out, step or 1):
        now = slice(first, min(first + step, d_out))
        width = now.stop - first
        wide, part = panel[:width].copy_(weight[now]).t(), product[: count * width].view(count, width)
        # Into the same memory every time: fresh pages would cost more than the conversions.
        results[:, now] = (
            torch.mm(rows, wide, out=part) if added is None else torch.addmm(added[now], rows, wide, out=part)
        )
    return y
