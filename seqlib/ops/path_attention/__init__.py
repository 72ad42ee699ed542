"""Attention whose positions are data: scores through the product of Householder maps between query and key (PaTH)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from seqlib.context import undisturbed
from seqlib.dispatch import Facts, Impl, Op
from seqlib.errors import UnsupportedInput
from seqlib.ops.path_attention.state import PathState
from seqlib.ops.path_attention.torch_impl import step
from seqlib.sequence import SequenceInfo

__all__ = ["IMPLS", "OP", "PathState", "path_attention", "step"]

_HERE = "seqlib.ops.path_attention"


def _one_tile(facts: Facts) -> str | None:
    width = max(facts.size("headdim"), facts.size("headdim_v"))
    return None if width <= 128 else f"heads are {width} wide; it takes up to 128"


IMPLS = (
    Impl(
        "triton",
        "chunked",
        f"{_HERE}.triton_impl:path_attention",
        devices=("cuda",),
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        needs=("triton>=3.6",),
        limits=_one_tile,
        gate=f"{_HERE}.triton_impl:gate",
    ),
    Impl("torch", "chunked", f"{_HERE}.torch_impl:path_attention_chunked"),
    Impl("reference", "reference", f"{_HERE}.reference:path_attention"),
)


def facts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    state: PathState | None = None,
    seq: SequenceInfo | None = None,
    **_: Any,
) -> Facts:
    tensors = [
        q,
        k,
        v,
        w,
        beta,
        *([] if log_decay is None else [log_decay]),
        *([] if state is None else state.tensors()),
    ]
    used = {
        "initial_state": state is not None,
        "packed": seq is not None and seq.starts is not None,
        "padded": seq is not None and seq.padding_mask is not None,
    }
    return Facts(
        q.device.type,
        q.dtype,
        q.shape[1],
        torch.is_grad_enabled() and any(t.requires_grad for t in tensors),
        frozenset(name for name, given in used.items() if given),
        (("headdim", q.shape[-1]), ("headdim_v", v.shape[-1])),
    )


OP = Op("path_attention", IMPLS, facts, "path_attention")


@undisturbed
def path_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    chunk_size: int | None = None,
    state: PathState | None = None,
    seq: SequenceInfo | None = None,
    form: str = "auto",
    backend: str = "auto",
) -> tuple[Tensor, PathState]:
    """Softmax attention with a position encoding that the tokens between query and key accumulate.

        H_t = I - beta_t w_t^T w_t
        y_i = sum_{j<=i} softmax_j(scale * q_i H_i H_{i-1} ... H_{j+1} k_j^T + sum_{j<t<=i} log_decay_t) v_j

    Query head h uses the keys, values, w and beta of head h // (nheads / nheads_kv). Computed in float32 (float64 for
    float64 inputs); differentiable in every tensor, the state included.

    Args:
        q: (batch, seqlen, nheads, headdim), a floating dtype.
        k: (batch, seqlen, nheads_kv, headdim), v: (batch, seqlen, nheads_kv, headdim_v), in the dtype of q.
        w: (batch, seqlen, nheads_kv, headdim) of length at most 1, float32 advised; normalise it before.
        beta: (batch, seqlen, nheads_kv) in [0, 2], float32 advised. Beyond, or with longer w, products of maps grow.
        log_decay: (batch, seqlen, nheads), at most 0, not scaled, below -10,000 counted as that; None forgets nothing.
        scale: None is 1/sqrt(headdim).
        chunk_size: tokens of a block; None leaves it to the form. It changes rounding and speed, nothing else.
        state: what came before; None is nothing.
        seq: documents and padding.

    Returns:
        y (batch, seqlen, nheads, headdim_v) in the dtype of q, zero at padding, and the state after the last token of
        each row, whose keys have come through all maps after them. The given state is not modified.

    Raises:
        UnsupportedInput: shapes, dtypes, devices or the state do not fit.

    Cost: 4 batch nheads headdim FLOPs per pair of query and key, and 2 batch nheads_kv headdim^2 / chunk_size to bring
    the keys to each block. Memory is linear in seqlen, with gradients too: they run the forward pass again.

    Source: Yang et al. 2025 (PaTH, arXiv 2505.16381), section 3; fla, ops/path_attn, which multiplies the decays by
    `scale` as well.
    """
    _check(q, k, v, w, beta, log_decay)
    if chunk_size is not None and chunk_size < 1:
        raise UnsupportedInput(f"chunk_size must be at least 1, got {chunk_size}")
    if state is not None:
        _check_state(q, v, log_decay, state)
    if seq is not None:
        seq.check(q.shape[0], q.shape[1])
        if seq.group is not None:
            raise UnsupportedInput("path_attention runs on one process; gather the sequence over seq.group first")
    run = OP.choose(facts(q, k, v, w, beta, log_decay, state=state, seq=seq), form, backend)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return run(q, k, v, w, beta, log_decay, scale=scale, chunk_size=chunk_size, state=state, seq=seq)


def _check(q: Tensor, k: Tensor, v: Tensor, w: Tensor, beta: Tensor, log_decay: Tensor | None) -> None:
    if any(t.dim() != 4 for t in (q, k, v)) or 0 in q.shape:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise UnsupportedInput(f"q, k, v must be (batch, seqlen, heads, headdim) and not empty, got {shapes}")
    batch, seqlen, nheads, headdim = q.shape
    nheads_kv = k.shape[2]
    if nheads_kv == 0 or nheads % nheads_kv:
        raise UnsupportedInput(f"nheads_kv must divide nheads, got {nheads_kv} and {nheads}")
    keys = (batch, seqlen, nheads_kv, headdim)
    for name, t, shape in (
        ("k", k, keys),
        ("v", v, (*keys[:3], v.shape[3])),
        ("w", w, keys),
        ("beta", beta, keys[:3]),
        ("log_decay", log_decay, (batch, seqlen, nheads)),
    ):
        if t is None:
            continue
        if tuple(t.shape) != shape or not t.is_floating_point():
            raise UnsupportedInput(f"{name} must be real with shape {shape}, got {t.dtype} {tuple(t.shape)}")
        if t.device != q.device:
            raise UnsupportedInput(f"every tensor must be on the device of q, {q.device}, got {name} on {t.device}")
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise UnsupportedInput(f"q, k, v must have one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}; cast them")


def _check_state(q: Tensor, v: Tensor, log_decay: Tensor | None, state: PathState) -> None:
    if not isinstance(state, PathState):
        raise UnsupportedInput(
            f"path_attention takes a PathState, whose keys are rewritten by every later token, got "
            f"{type(state).__name__}"
        )
    batch, _, nheads, headdim = q.shape
    capacity = state.capacity
    wanted = {
        "k": (batch, capacity, v.shape[2], headdim),
        "v": (batch, capacity, v.shape[2], v.shape[3]),
        "length": (batch,),
        "log_decay": None if log_decay is None else (batch, capacity, nheads),
    }
    for name, shape in wanted.items():
        tensor = getattr(state, name)
        if (None if tensor is None else tuple(tensor.shape)) != shape:
            got = None if tensor is None else tuple(tensor.shape)
            raise UnsupportedInput(f"state.{name} must be {shape} to fit these inputs, got {got}")
    if state.v.dtype != v.dtype or state.v.device != v.device:
        raise UnsupportedInput(f"state.v must be {v.dtype} on {v.device}, got {state.v.dtype} on {state.v.device}")
