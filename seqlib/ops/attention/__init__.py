"""Softmax attention: causal or not, full or windowed, grouped heads, over a state of keys and values."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from seqlib.context import undisturbed
from seqlib.dispatch import Facts, Impl, Op
from seqlib.errors import UnsupportedInput
from seqlib.ops.attention.decode import step
from seqlib.ops.attention.state import KVState
from seqlib.sequence import SequenceInfo

__all__ = ["IMPLS", "OP", "KVState", "attention", "step"]


def _nothing_to_cut(facts: Facts) -> str | None:
    sizes = dict(facts.sizes)
    if "window" not in sizes:
        return "attention without a window has nothing to cut"
    if facts.seqlen <= sizes["window"]:
        return f"the {facts.seqlen} queries fit into one window of {sizes['window']}"
    return None


def _not_for_triton(facts: Facts) -> str | None:
    widest = max(facts.size("headdim"), facts.size("headdim_v"))
    return _nothing_to_cut(facts) or (f"heads are {widest} wide; it takes up to 128" if widest > 128 else None)


_HERE = "seqlib.ops.attention"
IMPLS = (
    Impl(
        "triton",
        "chunked",
        f"{_HERE}.triton_impl:attention_windowed",
        devices=("cuda",),
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        needs=("triton>=3.6",),
        limits=_not_for_triton,
        refuses=frozenset({"log_decay", "relu"}),
        gate=f"{_HERE}.triton_impl:gate",
    ),
    Impl(
        "torch",
        "chunked",
        f"{_HERE}.torch_impl:attention_chunked",
        limits=_nothing_to_cut,
        refuses=frozenset({"bidirectional"}),
    ),
    Impl(
        "vendor",
        "parallel",
        f"{_HERE}.vendor_impl:attention",
        devices=("cuda",),
        dtypes=(torch.bfloat16, torch.float16),
        needs=("flash_attn",),
        refuses=frozenset({"initial_state", "headdim of v"}),
        by_name_only=True,
    ),
    Impl("torch", "parallel", f"{_HERE}.torch_impl:attention_parallel"),
    Impl("reference", "reference", f"{_HERE}.reference:attention"),
)


def facts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    window: int | None = None,
    causal: bool = True,
    relu: bool = False,
    state: KVState | None = None,
    seq: SequenceInfo | None = None,
    **_: Any,
) -> Facts:
    tensors = [q, k, v, *([] if log_decay is None else [log_decay]), *(state.tensors() if state is not None else ())]
    used = {
        "bidirectional": not causal,
        "headdim of v": v.shape[-1] != q.shape[-1],
        "log_decay": log_decay is not None,
        "relu": relu,
        "initial_state": state is not None,
        "packed": seq is not None and seq.starts is not None,
        "padded": seq is not None and seq.padding_mask is not None,
    }
    sizes = {"headdim": q.shape[-1], "headdim_v": v.shape[-1]} | ({} if window is None else {"window": window})
    return Facts(
        q.device.type,
        q.dtype,
        q.shape[1],
        torch.is_grad_enabled() and any(t.requires_grad for t in tensors),
        frozenset(name for name, given in used.items() if given),
        tuple(sizes.items()),
    )


OP = Op("attention", IMPLS, facts, "attention")


@undisturbed
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    window: int | None = None,
    causal: bool = True,
    scale: float | None = None,
    relu: bool = False,
    state: KVState | None = None,
    seq: SequenceInfo | None = None,
    form: str = "auto",
    backend: str = "auto",
) -> tuple[Tensor, KVState]:
    """Average the values by the softmax of the scores of the keys.

        y_i = sum_j softmax_j(scale * q_i . k_j + sum_{j<t<=i} log_decay_t) v_j
        over j <= i (causal) and |i - j| < window, i and j counted in real tokens of one document

    Query head h uses key and value head h // (nheads / nheads_kv). The softmax is in float32 (float64 for float64).
    Decays per token and head make it forgetting attention (FoX).

    Args:
        q: (batch, seqlen, nheads, headdim), a floating dtype.
        k: (batch, seqlen, nheads_kv, headdim), nheads_kv divides nheads.
        v: (batch, seqlen, nheads_kv, headdim_v).
        log_decay: (batch, seqlen, nheads), natural logarithms of forget gates, at most 0, any floating dtype and not
            scaled by `scale`; below -10,000 they count as -10,000. Only with causal=True. None forgets nothing.
        window: at least 1, the current token included; None for no bound.
        causal: False lets tokens see those after them; only without a state.
        scale: None is 1/sqrt(headdim).
        relu: weigh by relu(scale * q_i . k_j), without a sum to divide by, in place of the softmax; no log_decay.
        state: what came before; None is nothing. Of capacity = window when windowed, of any capacity otherwise.
        seq: documents and padding.
        form: "chunked" cuts windowed attention into blocks; "parallel" and "reference" take everything.

    Returns:
        y (batch, seqlen, nheads, headdim_v) in the dtype of q, zero at padding, and the state after the last token of
        each row: keys and values in their own dtype. The given state is not modified. Without state, seq and window
        the new state shares memory with k and v.

    Raises:
        UnsupportedInput: shapes, dtypes, devices or the state do not fit.

    Cost: 4 batch nheads headdim FLOPs per pair of query and visible key. Memory is linear in seqlen wherever
    torch has a fused kernel. One exception: differentiating through a span with a full cache before it keeps its masks,
    seqlen (past + seqlen) entries in all. With log_decay the forward pass is run again for gradients, and 16-bit inputs
    are attended in float32.

    Source: Vaswani et al. 2017, eq. 1; windows as in Mistral (Jiang et al. 2023), grouped heads of Ainslie et al. 2023;
    decays: Lin et al. 2025 (Forgetting Transformer, arXiv 2503.02130), eq. 4-6.
    """
    if window is not None and window < 1:
        raise UnsupportedInput(f"window must be at least 1 (it counts the current token) or None, got {window}")
    if not causal and state is not None:
        raise UnsupportedInput("causal=False sees the whole sequence at once and takes no state; pass state=None")
    _check_tensors(q, k, v)
    if log_decay is not None:
        _check_decay(q, log_decay, causal)
        if relu:
            raise UnsupportedInput("log_decay lowers the logarithms of weights, and relu=True has none; use only one")
    if state is not None:
        _check_state(k, v, state, window)
        _check_held(q, log_decay, state)
    if seq is not None:
        seq.check(q.shape[0], q.shape[1])
        if seq.group is not None:
            raise UnsupportedInput("attention runs on one process; gather keys and values over seq.group first")
    options: dict[str, Any] = {"window": window, "causal": causal, "relu": relu, "state": state, "seq": seq}
    run = OP.choose(facts(q, k, v, log_decay, **options), form, backend)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return run(q, k, v, log_decay, scale=scale, **options)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if any(t.dim() != 4 for t in (q, k, v)) or 0 in q.shape:
        raise UnsupportedInput(f"q, k, v must be (batch, seqlen, heads, headdim) and not empty, got {shapes}")
    if not q.shape[:2] == k.shape[:2] == v.shape[:2] or k.shape[2] != v.shape[2] or q.shape[3] != k.shape[3]:
        raise UnsupportedInput(
            f"q, k, v must share batch and seqlen, k and v their heads, q and k their headdim, got {shapes}"
        )
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise UnsupportedInput(f"nheads_kv must divide nheads, got {k.shape[2]} and {q.shape[2]}")
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise UnsupportedInput(f"q, k, v must have one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}; cast them")
    if not q.device == k.device == v.device:
        raise UnsupportedInput(f"q, k, v must be on one device, got {q.device}, {k.device}, {v.device}; move them")


def _check_decay(q: Tensor, log_decay: Tensor, causal: bool) -> None:
    if not causal:
        raise UnsupportedInput("log_decay says what later tokens forget and needs causal=True")
    if log_decay.shape != q.shape[:3] or not log_decay.is_floating_point() or log_decay.device != q.device:
        raise UnsupportedInput(
            f"log_decay must be real, (batch, seqlen, nheads) = {tuple(q.shape[:3])} on {q.device}, "
            f"got {log_decay.dtype} {tuple(log_decay.shape)} on {log_decay.device}"
        )


def _check_held(q: Tensor, log_decay: Tensor | None, state: KVState) -> None:
    held = None if state.log_decay is None else tuple(state.log_decay.shape)
    wanted = None if log_decay is None else (q.shape[0], state.capacity, q.shape[2])
    if held != wanted:
        raise UnsupportedInput(
            f"state.log_decay must be {wanted} beside {'no' if wanted is None else 'this'} log_decay, got {held}"
        )


def _check_state(k: Tensor, v: Tensor, state: KVState, window: int | None) -> None:
    if type(state) is not KVState:
        raise UnsupportedInput(f"attention takes a KVState, whose keys are as they came, got {type(state).__name__}")
    if window is not None and state.capacity != window:
        raise UnsupportedInput(f"a window of {window} needs a state of that capacity, got {state.capacity}")
    for name, new, old in (("k", k, state.k), ("v", v, state.v)):
        if (old.shape[0], *old.shape[2:]) != (new.shape[0], *new.shape[2:]) or old.shape[1] != state.capacity:
            raise UnsupportedInput(
                f"state.{name} must be (batch, capacity, nheads_kv, headdim) to fit {name} {tuple(new.shape)}, "
                f"got {tuple(old.shape)}"
            )
        if old.dtype != new.dtype or old.device != new.device:
            raise UnsupportedInput(
                f"state.{name} must be {new.dtype} on {new.device} like {name}, got {old.dtype} on {old.device}"
            )
    if tuple(state.length.shape) != (k.shape[0],):
        raise UnsupportedInput(f"state.length must be ({k.shape[0]},), got {tuple(state.length.shape)}")
    if window is None and int(state.length.max()) > state.capacity:
        raise UnsupportedInput(
            f"the state has dropped keys: {int(state.length.max())} tokens in {state.capacity} slots; "
            "it belongs to windowed attention, so pass window="
        )
