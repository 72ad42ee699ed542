"""The selective scan by the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from seqlib import native
from seqlib.ops.derivatives import once
from seqlib.sequence import SequenceInfo

__all__ = ["chunked", "step"]

native.load("cpu")
_forward = torch.ops.seqlib.selective_scan.default
_gradients = torch.ops.seqlib.selective_scan_bwd.default
_step = torch.ops.seqlib.selective_scan_step.default


def chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    seq: SequenceInfo | None,
) -> tuple[Tensor, Tensor]:
    given = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    return _forward(*given, None if seq is None else seq.plan(x.device), dt_softplus, keep)[:2]


def step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    *,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    return _step(x, dt, A, B, C, state, D, z, dt_bias, dt_softplus)


@torch.library.register_fake("seqlib::selective_scan")
def _fake(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    spans: Tensor | None,
    dt_softplus: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    slots: int | torch.SymInt = 0
    kept = (A.shape[1], A.shape[0])
    if x.device.type == "cuda":
        slots, kept = x.shape[0] * -(-x.shape[1] // _TILE) if keep else 0, (A.shape[0], A.shape[1])
    elif keep and spans is None:
        slots = x.shape[0] * ((x.shape[1] + _TILE - 1) // _TILE - 1)
    elif keep:
        slots = torch.library.get_ctx().new_dynamic_size()
    return (
        x.new_empty(x.shape),
        x.new_empty((x.shape[0], *A.shape), dtype=torch.float32),
        x.new_empty((slots, *kept), dtype=torch.float32),
    )


_TILE = 32  # kScanTile of kernels/cpu/selective_scan.h and kScanCheckpoint of kernels/cuda/selective_scan.h


@torch.library.register_fake("seqlib::selective_scan_bwd")
def _fake_bwd(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    spans: Tensor | None,
    checkpoints: Tensor,
    dt_softplus: bool,
) -> tuple[Tensor, ...]:
    batch, seqlen, d_inner = x.shape
    groups = B.shape[2] if B.dim() == 4 else 1

    def floats(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=torch.float32)

    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape),
        floats(*A.shape),
        floats(batch, groups, seqlen, A.shape[1]),
        floats(batch, groups, seqlen, A.shape[1]),
        floats(d_inner),
        x.new_empty(x.shape if z is not None else 0),
        floats(d_inner),
        floats(batch, *A.shape),
    )


@torch.library.register_fake("seqlib::selective_scan_step")
def _fake_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.dt_softplus, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


@once
def _backward(ctx, dy: Tensor | None, dfinal: Tensor | None, _) -> tuple[Tensor | None, ...]:
    *tensors, checkpoints = ctx.saved_tensors
    x, _dt, A, B, C, D, z, dt_bias, initial_state, _spans = tensors
    dy = x.new_zeros(x.shape) if dy is None else dy
    dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial = _gradients(dy, dfinal, *tensors, checkpoints, ctx.dt_softplus)

    def like(t: Tensor | None, gradient: Tensor) -> Tensor | None:
        return None if t is None else gradient.to(t.dtype)

    def projection(t: Tensor, gradient: Tensor) -> Tensor:
        return gradient.transpose(1, 2).reshape(t.shape).to(t.dtype)

    return (
        dx,
        ddt,
        like(A, dA),
        projection(B, dB),
        projection(C, dC),
        like(D, dD),
        dz if z is not None else None,
        like(dt_bias, dbias),
        like(initial_state, dinitial),
        None,
        None,
        None,
    )


torch.library.register_autograd("seqlib::selective_scan", _backward, setup_context=_save)
