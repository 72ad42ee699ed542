"""The causal convolution by the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from seqlib import native
from seqlib.ops.derivatives import once
from seqlib.sequence import SequenceInfo

__all__ = ["causal_conv1d", "step"]

native.load("cpu")
_forward = torch.ops.seqlib.causal_conv1d.default
_gradients = torch.ops.seqlib.causal_conv1d_bwd.default
_step = torch.ops.seqlib.causal_conv1d_step.default


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str | None,
    initial_state: Tensor | None,
    seq: SequenceInfo | None,
) -> tuple[Tensor, Tensor]:
    return _forward(
        x, weight, bias, initial_state, seq.plan(x.device) if seq is not None else None, activation == "silu"
    )


def step(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, *, activation: str | None) -> Tensor:
    return _step(x, weight, bias, state, activation == "silu")


@torch.library.register_fake("seqlib::causal_conv1d")
def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, spans: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], weight.shape[1] - 1, x.shape[2])


@torch.library.register_fake("seqlib::causal_conv1d_bwd")
def _fake_bwd(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    spans: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    (batch, _, d), d_conv = x.shape, weight.shape[1]
    return (
        x.new_empty(x.shape),
        x.new_empty(d_conv + 1, d, dtype=torch.float32),
        x.new_empty(batch if initial_state is not None else 0, d_conv - 1, d),
    )


@torch.library.register_fake("seqlib::causal_conv1d_step")
def _fake_step(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, silu: bool) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


@once
def _backward(ctx, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, bias, initial_state, spans = ctx.saved_tensors
    dy = x.new_zeros(x.shape) if dy is None else dy
    dx, dtaps, dstate = _gradients(dy, dfinal, x, weight, bias, initial_state, spans, ctx.silu)
    return (
        dx,
        dtaps[:-1].T.to(weight.dtype),
        dtaps[-1].to(bias.dtype) if bias is not None else None,
        dstate if initial_state is not None else None,
        None,
        None,
    )


torch.library.register_autograd("seqlib::causal_conv1d", _backward, setup_context=_save)
