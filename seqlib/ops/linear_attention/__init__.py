"""Linear attention: a matrix state that decays and takes in one key-value product per token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from seqlib.context import undisturbed, values_seen
from seqlib.dispatch import TRANSFORMED, Facts, Impl, Op
from seqlib.errors import UnsupportedInput
from seqlib.ops.linear_attention.summary import combine, summarize
from seqlib.sequence import SequenceInfo

__all__ = ["IMPLS", "OP", "STEP", "STEP_IMPLS", "combine", "linear_attention", "step", "summarize"]

_HERE = "seqlib.ops.linear_attention"


def _divides(facts: Facts) -> str | None:
    if facts.needs_grad and "decay per token" in facts.features:
        return "it divides v by the decay of each token, which leaves no digits of some gradients"
    return None


_NATIVE: dict[str, Any] = {"devices": ("cpu",), "dtypes": (torch.float32, torch.bfloat16), "needs": ("native",)}
_CUDA: dict[str, Any] = {
    "devices": ("cuda",),
    "dtypes": (torch.float32, torch.bfloat16, torch.float16),
    "needs": ("native:cuda",),
}
_TRITON_STATE = 256


def _narrow(facts: Facts) -> str | None:
    d_state = facts.size("d_state")
    return None if d_state <= _TRITON_STATE else f"d_state is {d_state}; it takes up to {_TRITON_STATE}"


IMPLS = (
    Impl(
        "triton",
        "chunked",
        f"{_HERE}.triton_impl:linear_attention",
        devices=("cuda",),
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        needs=("triton>=3.6",),
        limits=_narrow,
        refuses=frozenset({"chunk_size"}),
        gate=f"{_HERE}.triton_impl:gate",
    ),
    Impl(
        "native",
        "chunked",
        f"{_HERE}.native_impl:linear_attention",
        refuses=frozenset({"chunk_size"}),
        **_NATIVE,
    ),
    Impl(
        "vendor",
        "chunked",
        f"{_HERE}.vendor_impl:chunked",
        devices=("cuda",),
        dtypes=(torch.float32, torch.bfloat16),
        needs=("mamba_ssm",),
        limits=_divides,
        refuses=frozenset({"decay per channel", "bidirectional", "packed", "padded"}),
        by_name_only=True,
    ),
    Impl("torch", "chunked", f"{_HERE}.torch_impl:chunked", refuses=frozenset({TRANSFORMED})),
    Impl("torch", "parallel", f"{_HERE}.torch_impl:parallel", by_name_only=True),
    Impl("reference", "reference", f"{_HERE}.reference:linear_attention"),
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
    log_decay: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    chunk_size: int | None = None,
    causal: bool = True,
    seq: SequenceInfo | None = None,
    **_: Any,
) -> Facts:
    needs_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (q, k, v, log_decay, initial_state)
    )
    used = {
        "chunk_size": chunk_size is not None,
        "bidirectional": not causal,
        "packed": seq is not None and seq.starts is not None,
        "padded": seq is not None and seq.padding_mask is not None,
    }
    features = {name for name, on in used.items() if on}
    if log_decay is not None:
        features.add({v.dim(): "decay per channel", 1: "decay per head"}.get(log_decay.dim(), "decay per token"))
    seqlen = v.shape[1] if v.dim() == 4 else 1
    sizes = (("d_state", k.shape[-1]), ("headdim", v.shape[-1]))
    return Facts(v.device.type, v.dtype, seqlen, needs_grad, frozenset(features), sizes)


OP = Op("linear_attention", IMPLS, facts, "linear_attention")
STEP = Op("linear_attention", STEP_IMPLS, facts, "step")


@undisturbed
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    causal: bool = True,
    chunk_size: int | None = None,
    seq: SequenceInfo | None = None,
    form: str = "auto",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attend through a state of fixed size that decays and adds one key-value product per token.

        S_t = exp(log_decay_t) S_{t-1} + k_t^T v_t                            per head, (d_state, headdim)
        y_t = scale * q_t S_t
        causal=False:  y_t = scale * sum_s exp(log_decay |t - s|) (q_t . k_s) v_s

    Plain linear attention, lightning attention and RetNet (constant log_decay per head), Mamba-2 (one value per token
    and head) and GLA (one per token and key channel) are this op. Computed in float32 (float64 for float64 inputs)
    whatever the input dtype; differentiable in every tensor, the initial state included, and through the final state.

    Args:
        q: (batch, seqlen, heads, d_state). heads is nheads, or a divisor of it: head g then serves the g-th block of
            neighbouring value heads (Mamba-2's groups).
        k: as q; may have a different number of heads.
        v: (batch, seqlen, nheads, headdim), in the dtype of q and k.
        log_decay: natural logarithm of the decay, at most 0 and -inf to forget; None is no decay. Constant (nheads,),
            per token (batch, seqlen, nheads) or per key channel (batch, seqlen, nheads, d_state). Any float dtype;
            float32 is advised, since bfloat16 cannot tell long memories apart.
        scale: factor on the outputs; published models use 1 or d_state**-0.5.
        initial_state: (batch, nheads, d_state, headdim); None is zero. It includes the last token before this span,
            undecayed. Needs causal=True.
        causal: False lets every token see its whole document; log_decay must then be None or constant.
        chunk_size: positions worked on together by the chunked forms; None leaves it to them. It changes rounding and
            speed, nothing else.
        seq: documents and padding; y is zero at padded positions.

    Returns:
        y (batch, seqlen, nheads, headdim) in the dtype of v, and the final state (batch, nheads, d_state, headdim) in
        float32 (float64 for float64 inputs), after the last token, undecayed; for causal=False it is the causal one.

    Raises:
        UnsupportedInput: shapes, dtypes or devices do not fit, or a constant log_decay is positive. Decays per token
            are not searched for positive values (the reference does that): the fast forms may overflow on them.

    Cost: about 4 * batch * seqlen * nheads * (chunk * (d_state + headdim) / 2 + d_state * headdim) operations.

    Source: Katharopoulos et al. 2020, eq. 9-11; Qin et al. 2024 (Lightning Attention-2), algorithm 1; Dao and Gu 2024
    (Mamba-2), section 6; Yang et al. 2024 (GLA), eq. 3. States include the current token (as fla's and MiniMax's do;
    the lightning-attention kernels carry one decay more).
    """
    if v.dim() != 4 or v.numel() == 0:
        raise UnsupportedInput(f"v must be (batch, seqlen, nheads, headdim) and not empty, got {tuple(v.shape)}")
    _check(q, k, v, log_decay, initial_state)
    # On other devices the question would wait for the device.
    if log_decay is not None and log_decay.dim() == 1 and v.device.type == "cpu" and values_seen():
        if bool((log_decay > 0).any()):
            raise UnsupportedInput(f"log_decay must be at most 0, got a largest value of {float(log_decay.max())}")
    if not causal and initial_state is not None:
        raise UnsupportedInput("causal=False takes no initial_state: every token sees its whole document")
    if not causal and log_decay is not None and log_decay.dim() > 1:
        raise UnsupportedInput(
            f"causal=False needs log_decay None or constant {(v.shape[2],)}, got {tuple(log_decay.shape)}: decay from "
            "the right is not defined by values per token; add two causal calls, one on flipped inputs"
        )
    if chunk_size is not None and chunk_size < 1:
        raise UnsupportedInput(f"chunk_size must be at least 1, got {chunk_size}")
    if seq is not None:
        seq.check(v.shape[0], v.shape[1])
    options: dict[str, Any] = {"initial_state": initial_state, "causal": causal, "chunk_size": chunk_size, "seq": seq}
    run = OP.choose(facts(q, k, v, log_decay, **options), form, backend)
    return run(q, k, v, log_decay, scale=scale, **options)


@undisturbed
def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    *,
    scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """One token of `linear_attention`, for decoding: **writes the new state into `state`** and has no gradient.

    Args:
        q, k: (batch, heads, d_state), heads dividing nheads.
        v: (batch, nheads, headdim).
        log_decay: None, (nheads,), (batch, nheads) or (batch, nheads, d_state).
        state: (batch, nheads, d_state, headdim) contiguous, float32 (float64 for float64 inputs).

    Returns:
        y (batch, nheads, headdim) in the dtype of v.

    Raises:
        UnsupportedInput: shapes, dtypes or devices do not fit.

    Source: as `linear_attention`.
    """

    def choose() -> Callable[..., Tensor]:
        if v.dim() != 3:
            raise UnsupportedInput(f"v must have shape (batch, nheads, headdim), got {tuple(v.shape)}")
        _check(q, k, v, log_decay, state)
        wanted = torch.float64 if v.dtype == torch.float64 else torch.float32
        if state.dtype != wanted:
            raise UnsupportedInput(f"state must be {wanted} to be updated in place, got {state.dtype}")
        return STEP.choose(facts(q, k, v, log_decay), "recurrent", backend)

    if not state.is_contiguous():
        raise UnsupportedInput("state must be contiguous to be updated in place; make it so once, with .contiguous()")
    with torch.no_grad():
        run = STEP.recall(backend, (q, k, v, log_decay, state), choose)
        return run(q, k, v, log_decay, state, scale)


def _check(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None) -> None:
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
    if log_decay is not None:
        shapes = [(nheads,), (*lead, nheads), (*lead, nheads, d_state)]
        fitting = [shape for shape in shapes if len(shape) == log_decay.dim()]  # open sizes are compared alike only
        if tuple(log_decay.shape) not in fitting or not log_decay.is_floating_point():
            allowed = ", ".join(map(str, shapes))
            raise UnsupportedInput(
                f"log_decay must be real with shape {allowed} or None, got {log_decay.dtype} {tuple(log_decay.shape)}"
            )
    wanted = (v.shape[0], nheads, d_state, headdim)
    if state is not None and (tuple(state.shape) != wanted or not state.is_floating_point()):
        raise UnsupportedInput(f"the state must be real with shape {wanted}, got {state.dtype} {tuple(state.shape)}")
    if any(t is not None and t.device != v.device for t in (q, k, log_decay, state)):
        raise UnsupportedInput(f"every tensor must be on the device of v, {v.device}; move them with .to(v.device)")
