"""The selective state space of Mamba: diagonal A per channel, dt, B and C read off the input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqlib.context import undisturbed
from seqlib.dispatch import Facts, Impl, Op
from seqlib.errors import UnsupportedInput
from seqlib.ops.selective_scan.summary import combine, state_dtype, summarize
from seqlib.sequence import SequenceInfo

__all__ = ["IMPLS", "OP", "STEP", "STEP_IMPLS", "combine", "selective_scan", "step", "summarize"]

_HERE = "seqlib.ops.selective_scan"


_CUDA_STATES = 256
_UNSUPPORTED = frozenset({"complex A", "constant B or C", "float64 B or C"})


def _narrow(facts: Facts) -> str | None:
    d_state = facts.size("d_state")
    return None if d_state <= _CUDA_STATES else f"d_state is {d_state}; it takes up to {_CUDA_STATES}"


def _native(form: str, function: str) -> tuple[Impl, Impl]:
    target = f"{_HERE}.native_impl:{function}"
    dtypes = (torch.float32, torch.bfloat16)
    return (
        Impl(
            "native",
            form,
            target,
            devices=("cpu",),
            dtypes=dtypes,
            needs=("native",),
            refuses=_UNSUPPORTED | {"float16 B or C"},
        ),
        Impl(
            "native",
            form,
            target,
            devices=("cuda",),
            dtypes=(*dtypes, torch.float16),
            needs=("native:cuda",),
            limits=_narrow,
            refuses=_UNSUPPORTED,
        ),
    )


IMPLS = (
    *_native("chunked", "chunked"),
    Impl(
        "vendor",
        "chunked",
        f"{_HERE}.vendor_impl:chunked",
        devices=("cuda",),
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        needs=("mamba_ssm",),
        limits=_narrow,
        refuses=_UNSUPPORTED | {"initial_state", "packed", "padded"},
        by_name_only=True,
    ),
    Impl("torch", "chunked", f"{_HERE}.torch_impl:chunked", loops=True),
    Impl("reference", "reference", f"{_HERE}.reference:selective_scan"),
)
STEP_IMPLS = (
    *_native("recurrent", "step"),
    Impl("torch", "recurrent", f"{_HERE}.torch_impl:step"),
)


def facts(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, seq: SequenceInfo | None = None, **options: Any
) -> Facts:
    needs_grad = torch.is_grad_enabled() and any(
        isinstance(t, Tensor) and t.requires_grad for t in (x, dt, A, B, C, *options.values())
    )
    features = {"complex A"} if A.is_complex() else set()
    if x.dim() == 3 and 2 in (B.dim(), C.dim()):
        features.add("constant B or C")
    odd = {torch.float16: "float16 B or C", torch.float64: "float64 B or C"}
    features |= {odd[t.dtype] for t in (B, C) if t.dtype in odd}
    used = {
        "initial_state": options.get("initial_state") is not None,
        "packed": seq is not None and seq.starts is not None,
        "padded": seq is not None and seq.padding_mask is not None,
    }
    features |= {name for name, on in used.items() if on}
    seqlen = x.shape[1] if x.dim() == 3 else 1
    return Facts(x.device.type, x.dtype, seqlen, needs_grad, frozenset(features), (("d_state", A.shape[-1]),))


OP = Op("selective_scan", IMPLS, facts, "selective_scan")
STEP = Op("selective_scan", STEP_IMPLS, facts, "step")


@undisturbed
def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    seq: SequenceInfo | None = None,
    form: str = "auto",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Scan every channel with its own diagonal state space, whose step size and projections depend on the token.

        delta_t = softplus(dt_t + dt_bias)                        (each part only if asked for)
        h_t = exp(delta_t A) * h_{t-1} + delta_t x_t B_t          per channel, d_state values
        y_t = (C_t . h_t + D x_t) * silu(z_t)                     complex A: 2 Re(C_t . h_t)

    Computed in float32 (float64 for float64 inputs) whatever the input dtype; differentiable in every tensor, the
    initial state included, and through the final state.

    Args:
        x: (batch, seqlen, d_inner) inputs.
        dt: the shape and dtype of x; step sizes, or their pre-activation with `dt_softplus`.
        A: (d_inner, d_state), negative; complex with negative real part for complex states.
        B: (batch, seqlen, d_state), (batch, seqlen, ngroups, d_state), or constant (d_inner, d_state). Group g serves
            the g-th block of d_inner / ngroups neighbouring channels.
        C: as B; one without groups serves all groups of the other.
        D: (d_inner,) skip weights.
        z: gate, the shape and dtype of x.
        dt_bias: (d_inner,).
        initial_state: (batch, d_inner, d_state); None is zero.
        seq: documents and padding; y is zero at padded positions.

    Returns:
        y (batch, seqlen, d_inner) in the dtype of x, and the final state (batch, d_inner, d_state) in float32 (float64
        for float64 inputs, complex for complex A).

    Raises:
        UnsupportedInput: shapes, dtypes or devices do not fit.

    Cost: batch * seqlen * d_inner * d_state exponentials; memory beyond inputs and outputs is one state per chunk.

    Source: Gu and Dao 2023 (Mamba), algorithm 2, with the Euler step for B that its implementation uses
    (state-spaces/mamba, selective_scan_interface.py); unlike there, states may enter and carry gradients.
    """
    if x.dim() != 3 or x.numel() == 0:
        raise UnsupportedInput(f"x must be (batch, seqlen, d_inner) and not empty, got {tuple(x.shape)}")
    batch, seqlen, _ = x.shape
    _check(x, dt, A, B, C, D, z, dt_bias, initial_state, (batch, seqlen), constant=True)
    B, C = _over_groups(B, C, 3), _over_groups(C, B, 3)
    if seq is not None:
        seq.check(batch, seqlen)
    options = {"D": D, "z": z, "dt_bias": dt_bias, "initial_state": initial_state}
    run = OP.choose(facts(x, dt, A, B, C, seq=seq, **options), form, backend)
    return run(x, dt, A, B, C, dt_softplus=dt_softplus, seq=seq, **options)


@undisturbed
def step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    backend: str = "auto",
) -> Tensor:
    """One token of `selective_scan`, for decoding: **writes the new state into `state`** and has no gradient.

    Args:
        x, dt, z: (batch, d_inner).
        A: (d_inner, d_state).
        B, C: (batch, d_state) or (batch, ngroups, d_state).
        state: (batch, d_inner, d_state) contiguous, float32 (float64 for float64 inputs, complex for complex A).
        D, dt_bias: (d_inner,).

    Returns:
        y (batch, d_inner) in the dtype of x.

    Raises:
        UnsupportedInput: shapes, dtypes or devices do not fit.

    Source: as `selective_scan`.
    """
    if x.dim() != 2:
        raise UnsupportedInput(f"x must have shape (batch, d_inner), got {tuple(x.shape)}")
    _check(x, dt, A, B, C, D, z, dt_bias, state, (x.shape[0],), constant=False)
    B, C = _over_groups(B, C, 2), _over_groups(C, B, 2)
    if state.dtype != (wanted := state_dtype(x, A)) or not state.is_contiguous():
        raise UnsupportedInput(f"state must be contiguous {wanted} to be updated in place, got {state.dtype}")
    with torch.no_grad():
        run = STEP.choose(facts(x, dt, A, B, C), "recurrent", backend)
        return run(x, dt, A, B, C, state, D=D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus)


def _over_groups(t: Tensor, other: Tensor, axes: int) -> Tensor:
    """t, shared by all groups, for each of them if `other` has groups; `axes` is what t has without them."""
    return t.unsqueeze(-2).expand_as(other) if t.dim() == axes and other.dim() == axes + 1 else t


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor | None,
    lead: tuple[int, ...],
    *,
    constant: bool,
) -> None:
    d_inner = x.shape[-1]
    if A.dim() != 2 or A.shape[0] != d_inner or A.shape[1] < 1:
        raise UnsupportedInput(f"A must have shape (d_inner={d_inner}, d_state), got {tuple(A.shape)}")
    d_state = A.shape[1]
    for name, t in (("dt", dt), ("z", z)):
        if t is not None and (t.shape != x.shape or t.dtype != x.dtype):
            raise UnsupportedInput(
                f"{name} must match x: {x.dtype} {tuple(x.shape)}, got {t.dtype} {tuple(t.shape)}; cast or reshape it"
            )
    for name, t in (("D", D), ("dt_bias", dt_bias)):
        if t is not None and tuple(t.shape) != (d_inner,):
            raise UnsupportedInput(f"{name} must have shape ({d_inner},), got {tuple(t.shape)}")
    for name, t in (("B", B), ("C", C)):
        groups = t.shape[-2] if t.dim() == len(lead) + 2 else 1
        shapes = [(*lead, d_state), (*lead, groups, d_state)] + ([(d_inner, d_state)] if constant else [])
        if tuple(t.shape) not in shapes or groups < 1 or d_inner % groups:
            axes = ", ".join(("batch", "seqlen")[: len(lead)])
            raise UnsupportedInput(
                f"{name} must have shape {(*lead, d_state)} or ({axes}, ngroups, d_state) with ngroups dividing "
                f"d_inner={d_inner}{f', or constant {(d_inner, d_state)}' if constant else ''}, got {tuple(t.shape)}"
            )
        if t.is_complex() and not A.is_complex():
            raise UnsupportedInput(f"{name} is complex but A is real; make A complex with A.to(torch.cfloat)")
    if B.dim() == C.dim() == len(lead) + 2 and B.shape != C.shape:
        raise UnsupportedInput(f"B and C must have the same ngroups, got {tuple(B.shape)} and {tuple(C.shape)}")
    if state is not None and tuple(state.shape) != (x.shape[0], d_inner, d_state):
        raise UnsupportedInput(f"the state must have shape {(x.shape[0], d_inner, d_state)}, got {tuple(state.shape)}")
    if state is not None and state.is_complex() and not A.is_complex():
        raise UnsupportedInput("the state is complex but A is real; make A complex with A.to(torch.cfloat)")
    for name, t in (("x", x), ("D", D), ("dt_bias", dt_bias)):
        if t is not None and not t.is_floating_point():
            raise UnsupportedInput(f"{name} must be real floating point, got {t.dtype}")
    if any(t is not None and t.device != x.device for t in (dt, A, B, C, D, z, dt_bias, state)):
        raise UnsupportedInput(f"every tensor must be on the device of x, {x.device}; move them with .to(x.device)")
