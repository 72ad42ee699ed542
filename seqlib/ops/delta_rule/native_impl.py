"""The delta rule by the compiled CPU kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqlib import native
from seqlib.ops.derivatives import once
from seqlib.sequence import SequenceInfo

__all__ = ["chunked", "step"]

native.load("cpu")
_PIECE = 64  # tokens between two saved states: delta_piece of kernels/cpu/delta_rule.h
_forward = torch.ops.seqlib.delta_rule.default
_gradients = torch.ops.seqlib.delta_rule_bwd.default
_step = torch.ops.seqlib.delta_rule_step.default


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float,
    initial_state: Tensor | None,
    chunk_size: int | None,
    seq: SequenceInfo | None,
) -> tuple[Tensor, Tensor]:
    spans = None if seq is None else seq.spans
    tensors = (q, k, v, beta, log_decay, initial_state)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    y, state, _ = _forward(*tensors, spans, scale, save)
    return y, state


def step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor, scale: float
) -> Tensor:
    return _step(q, k, v, beta, log_decay, state, scale)


@torch.library.register_fake("seqlib::delta_rule")
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    spans: Tensor | None,
    scale: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, seqlen, nheads, headdim = v.shape
    saved: Any = 0
    if save:  # how many depends on the documents
        saved = batch * -(-seqlen // _PIECE) if spans is None else torch.library.get_ctx().new_dynamic_size()
    state = (nheads, k.shape[-1], headdim)
    return (
        v.new_empty(v.shape),
        v.new_empty(batch, *state, dtype=torch.float32),
        v.new_empty(saved, *state, dtype=torch.float32),
    )


@torch.library.register_fake("seqlib::delta_rule_bwd")
def _fake_bwd(
    dy: Tensor,
    dfinal: Tensor | None,
    saved: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    spans: Tensor | None,
    scale: float,
) -> tuple[Tensor, ...]:
    batch, seqlen, nheads, headdim = v.shape
    shapes = (
        (batch, seqlen, nheads, k.shape[-1]),
        (batch, seqlen, nheads, k.shape[-1]),
        v.shape,
        beta.shape,
        (0,) if log_decay is None else log_decay.shape,
        (0 if initial_state is None else batch, nheads, k.shape[-1], headdim),
    )
    return tuple(v.new_empty(shape, dtype=torch.float32) for shape in shapes)


@torch.library.register_fake("seqlib::delta_rule_step")
def _fake_step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor, scale: float
) -> Tensor:
    return v.new_empty(v.shape)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.scale, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


@once
def _backward(ctx, dy: Tensor | None, dfinal: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    *inputs, spans, saved = ctx.saved_tensors
    q, k, v = inputs[:3]
    dy = torch.zeros_like(v) if dy is None else dy
    made = list(_gradients(dy, dfinal, saved, *inputs, spans, ctx.scale))
    for i, t in enumerate((q, k)):
        if t.shape[2] != v.shape[2]:
            made[i] = made[i].unflatten(2, (t.shape[2], -1)).sum(3)
    grads = (None if t is None else d.to(t.dtype) for d, t in zip(made, inputs))
    return (*grads, None, None, None)


torch.library.register_autograd("seqlib::delta_rule", _backward, setup_context=_save)
