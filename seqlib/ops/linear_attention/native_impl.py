"""Linear attention by the compiled CPU kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from seqlib import native
from seqlib.ops.derivatives import once
from seqlib.ops.linear_attention.bidirectional import bidirectional
from seqlib.sequence import SequenceInfo

__all__ = ["linear_attention", "step"]

native.load("cpu")
_forward = torch.ops.seqlib.linear_attention.default
_gradients = torch.ops.seqlib.linear_attention_bwd.default
_step = torch.ops.seqlib.linear_attention_step.default


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float,
    initial_state: Tensor | None,
    causal: bool,
    chunk_size: int | None,
    seq: SequenceInfo | None,
) -> tuple[Tensor, Tensor]:
    def run(
        q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, seq: SequenceInfo | None
    ) -> tuple[Tensor, Tensor]:
        spans = None if seq is None else seq.spans
        keep = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (q, k, v, log_decay, initial_state)
        )
        return _forward(q, k, v, log_decay, initial_state, spans, scale, keep)[:2]

    return run(q, k, v, log_decay, seq) if causal else bidirectional(run, q, k, v, log_decay, scale, seq)


def step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, scale: float) -> Tensor:
    return _step(q, k, v, log_decay, state, scale)


@torch.library.register_fake("seqlib::linear_attention")
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    spans: Tensor | None,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    state = (v.shape[2], k.shape[3], v.shape[3])
    count: int | torch.SymInt = 0
    if keep and spans is None:
        every = min(max(32768 // (state[1] * state[2]), 1), 8)  # as in linear_attention.cpp
        chunk = 16 if log_decay is not None and log_decay.dim() == 4 else 64
        count = v.shape[0] * -(-v.shape[1] // (chunk * every))
    elif keep:
        count = torch.library.get_ctx().new_dynamic_size()
    return (
        v.new_empty(v.shape),
        v.new_empty(v.shape[0], *state, dtype=torch.float32),
        v.new_empty(count, *state, dtype=torch.float32),
    )


@torch.library.register_fake("seqlib::linear_attention_bwd")
def _fake_bwd(
    dy: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    spans: Tensor | None,
    checkpoints: Tensor,
    scale: float,
    needs_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shared = [torch.float32 if t.shape[2] != v.shape[2] else t.dtype for t in (q, k)]
    decays = log_decay.shape if needs_decay and log_decay is not None else (0,)
    return (
        q.new_empty(q.shape, dtype=shared[0]),
        k.new_empty(k.shape, dtype=shared[1]),
        v.new_empty(v.shape),
        v.new_empty(decays, dtype=torch.float32),
        v.new_empty(v.shape[0], v.shape[2], k.shape[3], v.shape[3], dtype=torch.float32),
    )


@torch.library.register_fake("seqlib::linear_attention_step")
def _fake_step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, scale: float) -> Tensor:
    return v.new_empty(v.shape)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.scale, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


@once
def _backward(ctx, dy: Tensor | None, dfinal: Tensor | None, _) -> tuple[Tensor | None, ...]:
    *tensors, checkpoints = ctx.saved_tensors
    q, k, v, log_decay, initial_state, _spans = tensors
    dy = v.new_zeros(v.shape) if dy is None else dy
    needs_decay = ctx.needs_input_grad[3]
    dq, dk, dv, dlog_decay, dinitial = _gradients(dy, dfinal, *tensors, checkpoints, ctx.scale, needs_decay)
    return (
        dq.to(q.dtype),
        dk.to(k.dtype),
        dv,
        dlog_decay.to(log_decay.dtype) if needs_decay else None,
        dinitial.to(initial_state.dtype) if initial_state is not None else None,
        None,
        None,
        None,
    )


torch.library.register_autograd("seqlib::linear_attention", _backward, setup_context=_save)
