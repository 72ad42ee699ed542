"""The delta rule: a matrix state that is corrected towards each new value instead of only added to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from seqlib.context import undisturbed
from seqlib.dispatch import TRANSFORMED, Facts, Impl, Op
from seqlib.errors import UnsupportedInput
from seqlib.ops.delta_rule.summary import combine, summarize
from seqlib.sequence import SequenceInfo

__all__ = ["IMPLS", "OP", "STEP", "STEP_IMPLS", "WIDEST_STATE", "combine", "delta_rule", "step", "summarize"]

_HERE = "seqlib.ops.delta_rule"
WIDEST_STATE = 256
"""Largest d_state of the native and Triton rows."""


def _narrow(facts: Facts) -> str | None:
    d_state = facts.size("d_state")
    return None if d_state <= WIDEST_STATE else f"d_state is {d_state}; it takes up to {WIDEST_STATE}"


_NATIVE: dict[str, Any] = {
    "devices": ("cpu",),
    "dtypes": (torch.float32, torch.bfloat16),
    "needs": ("native",),
    "limits": _narrow,
}
_CUDA: dict[str, Any] = _NATIVE | {
    "devices": ("cuda",),
    "dtypes": (torch.float32, torch.bfloat16, torch.float16),
    "needs": ("native:cuda",),
}
IMPLS = (
    Impl(
        "triton",
        "chunked",
        f"{_HERE}.triton_impl:delta_rule",
        devices=("cuda",),
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        needs=("triton>=3.6",),
        limits=_narrow,
        refuses=frozenset({"chunk_size"}),
        gate=f"{_HERE}.triton_impl:gate",
    ),
    Impl("native", "chunked", f"{_HERE}.native_impl:chunked", refuses=frozenset({"chunk_size"}), **_NATIVE),
    Impl("torch", "chunked", f"{_HERE}.torch_impl:chunked", refuses=frozenset({TRANSFORMED})),
    Impl("reference", "reference", f"{_HERE}.reference:delta_rule"),
)
STEP_IMPLS = (
    Impl("native", "recurrent", f"{_HERE}.native_impl:step", grad=False, **_NATIVE),
    Impl("native", "recurrent", f"{_HERE}.native_impl:step", grad=False, **_CUDA),
    Impl("torch", "recurrent", f"{_HERE}.torch_impl:step", grad=False),
)


def facts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    chunk_size: int | None = None,
    **_: Any,
) -> Facts:
    needs_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (q, k, v, beta, log_decay, initial_state)
    )
    features = {"chunk_size"} if chunk_size is not None else set()
    if log_decay is not None:
        features.add("decay per channel" if log_decay.dim() == v.dim() else "decay per token")
    seqlen = v.shape[1] if v.dim() == 4 else 1
    sizes = (("d_state", k.shape[-1]), ("headdim", v.shape[-1]))
    return Facts(v.device.type, v.dtype, seqlen, needs_grad, frozenset(features), sizes)


OP = Op("delta_rule", IMPLS, facts, "delta_rule")
STEP = Op("delta_rule", STEP_IMPLS, facts, "step")


@undisturbed
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    chunk_size: int | None = None,
    seq: SequenceInfo | None = None,
    form: str = "auto",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Decay the state, then move what it returns for the key a fraction beta of the way to the value.

        R_t = diag(exp(log_decay_t)) S_{t-1}                                  per head, (d_state, headdim)
        S_t = (I - beta_t k_t k_t^T) R_t + beta_t k_t v_t^T = R_t + beta_t k_t (v_t - R_t^T k_t)^T
        y_t = scale * S_t^T q_t

    Without log_decay this is DeltaNet, with one value per token and head Gated DeltaNet (Qwen3-Next, OLMo-Hybrid), with
    one per key channel KDA (Kimi Linear). Computed in float32 (float64 for float64 inputs) whatever the input dtype;
    differentiable in every tensor, the initial state included, and through the final state.

    Args:
        q: (batch, seqlen, heads, d_state). heads is nheads, or a divisor of it: head g then serves the g-th block of
            neighbouring value heads.
        k: as q; may have a different number of heads. The caller makes its norm 1 (an L2 norm over d_state); the state
            grows without bound where beta * |k|^2 > 2.
        v: (batch, seqlen, nheads, headdim), in the dtype of q and k.
        beta: (batch, seqlen, nheads) in [0, 2]; above 1 the transition has a negative eigenvalue. Any float dtype. The
            range is not searched for, since that would wait for the device.
        log_decay: natural logarithm of the decay, at most 0; None is no decay. (batch, seqlen, nheads) or, per key
            channel, (batch, seqlen, nheads, d_state). Any float dtype; float32 is advised, since bfloat16 cannot tell
            long memories apart.
        scale: factor on the outputs; published models use d_state**-0.5.
        initial_state: (batch, nheads, d_state, headdim); None is zero. It includes the last token before this span.
        chunk_size: positions worked on together by the chunked form; None leaves it to it. It changes rounding and
            speed, nothing else.
        seq: documents and padding; y is zero at padded positions.

    Returns:
        y (batch, seqlen, nheads, headdim) in the dtype of v, and the final state (batch, nheads, d_state, headdim) in
        float32 (float64 for float64 inputs).

    Raises:
        UnsupportedInput: shapes, dtypes or devices do not fit.

    Cost: about 8 * batch * seqlen * nheads * d_state * headdim operations.

    Source: Yang et al. 2024 (DeltaNet), eq. 5-11; Yang, Kautz and Hatamizadeh 2024 (Gated DeltaNet), eq. 10; Kimi Team
    2025 (Kimi Linear), eq. 1. As in their code the state decays first, is read for the error, and is written last.
    """
    if v.dim() != 4 or v.numel() == 0:
        raise UnsupportedInput(f"v must be (batch, seqlen, nheads, headdim) and not empty, got {tuple(v.shape)}")
    _check(q, k, v, beta, log_decay, initial_state)
    if chunk_size is not None and chunk_size < 1:
        raise UnsupportedInput(f"chunk_size must be at least 1, got {chunk_size}")
    if seq is not None:
        seq.check(v.shape[0], v.shape[1])
    options: dict[str, Any] = {"initial_state": initial_state, "chunk_size": chunk_size}
    run = OP.choose(facts(q, k, v, beta, log_decay, **options), form, backend)
    return run(q, k, v, beta, log_decay, scale=scale, seq=seq, **options)


@undisturbed
def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    *,
    scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """One token of `delta_rule`, for decoding: **writes the new state into `state`** and has no gradient.

    Args:
        q, k: (batch, heads, d_state), heads dividing nheads.
        v: (batch, nheads, headdim).
        beta: (batch, nheads).
        log_decay: None, (batch, nheads) or (batch, nheads, d_state).
        state: (batch, nheads, d_state, headdim) contiguous, float32 (float64 for float64 inputs).

    Returns:
        y (batch, nheads, headdim) in the dtype of v.

    Raises:
        UnsupportedInput: shapes, dtypes or devices do not fit.

    Source: as `delta_rule`.
    """

    def choose() -> Callable[..., Tensor]:
        if v.dim() != 3:
            raise UnsupportedInput(f"v must have shape (batch, nheads, headdim), got {tuple(v.shape)}")
        _check(q, k, v, beta, log_decay, state)
        wanted = torch.float64 if v.dtype == torch.float64 else torch.float32
        if state.dtype != wanted:
            raise UnsupportedInput(f"state must be {wanted} to be updated in place, got {state.dtype}")
        return STEP.choose(facts(q, k, v, beta, log_decay), "recurrent", backend)

    if not state.is_contiguous():
        raise UnsupportedInput("state must be contiguous to be updated in place; make it so once, with .contiguous()")
    with torch.no_grad():
        run = STEP.recall(backend, (q, k, v, beta, log_decay, state), choose)
        return run(q, k, v, beta, log_decay, state, scale)


def _check(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor | None) -> None:
    """v is (*lead, nheads, headdim) with lead (batch, seqlen) or, for one token, (batch,)."""
    *lead, nheads, headdim = v.shape
    d_state = k.shape[-1]
    for name, t in (("q", q), ("k", k)):
        heads = t.shape[-2] if t.dim() == v.dim() else 0
        if tuple(t.shape) != (*lead, heads, d_state) or heads < 1 or nheads % heads or d_state < 1:
            raise UnsupportedInput(
                f"{name} must have shape {(*lead, nheads, d_state)}, or with heads dividing nheads={nheads}, "
                f"got {tuple(t.shape)}"
            )
        if t.dtype != v.dtype or not v.is_floating_point():
            raise UnsupportedInput(f"q, k and v must share one real float dtype, got {name} {t.dtype} and v {v.dtype}")
    gates: dict[str, tuple[Tensor | None, list[tuple[int, ...]]]] = {
        "beta": (beta, [(*lead, nheads)]),
        "log_decay": (log_decay, [(*lead, nheads), (*lead, nheads, d_state)]),
    }
    for name, (gate, shapes) in gates.items():
        if gate is not None and (tuple(gate.shape) not in shapes or not gate.is_floating_point()):
            allowed = " or ".join(map(str, shapes))
            raise UnsupportedInput(f"{name} must be real with shape {allowed}, got {gate.dtype} {tuple(gate.shape)}")
    wanted = (v.shape[0], nheads, d_state, headdim)
    if state is not None and (tuple(state.shape) != wanted or not state.is_floating_point()):
        raise UnsupportedInput(f"the state must be real with shape {wanted}, got {state.dtype} {tuple(state.shape)}")
    if any(t is not None and t.device != v.device for t in (q, k, beta, log_decay, state)):
        raise UnsupportedInput(f"every tensor must be on the device of v, {v.device}; move them with .to(v.device)")
