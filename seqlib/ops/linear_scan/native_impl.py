"""The linear recurrence by the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from seqlib import native
from seqlib.ops.derivatives import once
from seqlib.sequence import SequenceInfo

__all__ = ["linear_scan"]

native.load("cpu")
_forward = torch.ops.seqlib.linear_scan.default
_gradients = torch.ops.seqlib.linear_scan_bwd.default


def linear_scan(
    a: Tensor, b: Tensor, *, initial_state: Tensor | None, reverse: bool, seq: SequenceInfo | None
) -> tuple[Tensor, Tensor]:
    shape = b.shape
    if a.is_complex() != b.is_complex():
        a, b = a.to(torch.cfloat), b.to(torch.cfloat)
    # What does not depend on the row or the position is not repeated for it.
    lead = (1,) * (b.dim() - a.dim()) + a.shape
    a = a.reshape(lead).expand(lead[0], lead[1], *shape[2:]).reshape(lead[0], lead[1], -1)
    if initial_state is not None:
        initial_state = initial_state.to(torch.cfloat if b.is_complex() else torch.float32)
        initial_state = initial_state.reshape(shape[0], -1)
    spans = None if seq is None else seq.plan(b.device)
    h, final = _forward(a, b.reshape(*shape[:2], -1), initial_state, spans, reverse)
    return h.reshape(shape), final.reshape(shape[0], *shape[2:])


@torch.library.register_fake("seqlib::linear_scan")
def _fake(
    a: Tensor, b: Tensor, initial_state: Tensor | None, spans: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    return b.new_empty(b.shape), b.new_empty((b.shape[0], b.shape[2]), dtype=_wide(b))


@torch.library.register_fake("seqlib::linear_scan_bwd")
def _fake_bwd(
    dh: Tensor,
    dfinal: Tensor | None,
    a: Tensor,
    h: Tensor,
    initial_state: Tensor | None,
    spans: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, width = h.shape
    return (
        a.new_empty((batch, a.shape[1], width), dtype=_wide(h)),
        h.new_empty(h.shape),
        h.new_empty((batch, width), dtype=_wide(h)),
    )


def _wide(t: Tensor) -> torch.dtype:
    return torch.complex64 if t.is_complex() else torch.float32


def _save(ctx, inputs, output) -> None:
    a, _, initial_state, spans, ctx.reverse = inputs
    ctx.save_for_backward(a, output[0], initial_state, spans)
    ctx.set_materialize_grads(False)


@once
def _backward(ctx, dh: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
    a, h, initial_state, spans = ctx.saved_tensors
    dh = h.new_zeros(h.shape) if dh is None else dh
    da, db, dinitial = _gradients(dh, dfinal, a, h, initial_state, spans, ctx.reverse)
    if a.shape[0] == 1:
        da = da.sum(0, keepdim=True)
    return da.to(a.dtype), db, dinitial if initial_state is not None else None, None, None


torch.library.register_autograd("seqlib::linear_scan", _backward, setup_context=_save)
