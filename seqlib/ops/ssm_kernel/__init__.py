"""Convolution kernels of time-invariant state spaces, and what a state adds to outputs and a span to a state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqlib.context import undisturbed
from seqlib.dispatch import OPEN, Facts, Impl, Op
from seqlib.errors import UnsupportedInput
from seqlib.ops.ssm_kernel.dense import (
    dense_final_state,
    dense_state_outputs,
    dplr_dense,
    dplr_recurrence,
    dplr_truncate,
)
from seqlib.ops.ssm_kernel.discretize import DISCRETIZATIONS, discretize
from seqlib.ops.ssm_kernel.state import final_state, state_outputs

__all__ = [
    "DPLR",
    "IMPLS",
    "OP",
    "dense_final_state",
    "dense_state_outputs",
    "discretize",
    "dplr_dense",
    "dplr_recurrence",
    "dplr_truncate",
    "final_state",
    "ssm_kernel_diag",
    "ssm_kernel_dplr",
    "state_outputs",
]

_HERE = "seqlib.ops.ssm_kernel"
_CUDA: dict[str, Any] = {"devices": ("cuda",), "dtypes": (torch.float32,), "needs": ("native:cuda",)}
IMPLS = (
    Impl(
        "native",
        "parallel",
        f"{_HERE}.native_impl:diag",
        devices=("cpu",),
        dtypes=(torch.float32,),
        needs=("native",),
        refuses=frozenset({OPEN}),
    ),
    Impl("native", "parallel", f"{_HERE}.cuda_impl:diag", **_CUDA),
    Impl("torch", "parallel", f"{_HERE}.torch_impl:diag"),
    Impl("reference", "reference", f"{_HERE}.reference:diag"),
)


def _rank_one(facts: Facts) -> str | None:
    rank, readouts = facts.size("rank"), facts.size("readouts")
    return None if rank == 1 and readouts <= 2 else f"rank {rank} and {readouts} readouts; it takes 1 and at most 2"


DPLR_IMPLS = (
    Impl(
        "native",
        "parallel",
        f"{_HERE}.native_impl:dplr",
        devices=("cpu",),
        dtypes=(torch.float32,),
        needs=("native",),
        refuses=frozenset({OPEN}),
        limits=_rank_one,
    ),
    Impl("native", "parallel", f"{_HERE}.cuda_impl:dplr", **_CUDA),
    Impl("torch", "parallel", f"{_HERE}.torch_impl:dplr"),
    Impl("reference", "reference", f"{_HERE}.reference:dplr"),
)


def facts(A: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int, **_: Any) -> Facts:
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (A, B, C, dt))
    return Facts(dt.device.type, dt.dtype, length, needs_grad)


def dplr_facts(A: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int, **_: Any) -> Facts:
    sizes = (("rank", P.shape[0]), ("readouts", C.shape[:-2].numel()))
    known = facts(A, B, C, dt, length)
    return known._replace(needs_grad=known.needs_grad or (torch.is_grad_enabled() and P.requires_grad), sizes=sizes)


OP = Op("ssm_kernel", IMPLS, facts, "ssm_kernel_diag")
DPLR = Op("ssm_kernel", DPLR_IMPLS, dplr_facts, "ssm_kernel_dplr")


@undisturbed
def ssm_kernel_diag(
    A: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    length: int,
    *,
    discretization: str = "zoh",
    form: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """The convolution kernel of diagonal state spaces h' = A h + B x, y = C h, one per channel.

        K[l] = 2 Re sum_n C_n B_bar_n exp(l log_decay_n),  l = 0 .. length-1      A complex
        K[l] =    sum_n C_n B_bar_n exp(l log_decay_n)                            A real

    with log_decay and B_bar of `discretize`. **Complex states stand for conjugate pairs**, hence the factor 2: d_state
    here is half of the N of the papers. Layers without pairs (DSS) pass C / 2. The current input is in the state that
    is read: K[0] = C B_bar multiplies it. A layer that runs at another sample rate multiplies dt.

    Args:
        A: (d, d_state), real or complex, negative real part.
        B: broadcasts to A.
        C: (..., d, d_state); leading axes are independent readouts of the same states.
        dt: (d,), or (d, d_state) for a step per state; positive. Its dtype decides that of the kernel.
        length: positions, >= 1.
        discretization: "zoh", "bilinear" or "dirac".

    Returns:
        (..., d, length) float32 (float64 for float64 dt).

    Raises:
        UnsupportedInput: shapes, dtypes or the discretization do not fit.

    Cost: d d_state length multiply-adds and 2 sqrt(length) d d_state exponentials; no tensor of d d_state length.

    Source: Gu et al. 2022 (S4D, arXiv 2206.11893), equation 6; the split of the powers in two levels is ours.
    """
    _check(A, B, C, dt, length)
    if discretization not in DISCRETIZATIONS:
        raise UnsupportedInput(f"discretization must be one of {', '.join(DISCRETIZATIONS)}, got {discretization!r}")
    run = OP.choose(facts(A, B, C, dt, length), form, backend)
    return run(A, B, C, dt, length, discretization=discretization)


@undisturbed
def ssm_kernel_dplr(
    A: Tensor,
    P: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    length: int,
    *,
    l_kernel: int | None = None,
    form: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """The convolution kernel of diagonal-plus-low-rank state spaces (S4), bilinear with step dt.

        h' = (diag(A) - P P*) h + B x,  y = 2 Re(C h),  K[l] = C A_bar^l B_bar
        A_bar = (1 - dt/2 M)^-1 (1 + dt/2 M),  B_bar = (1 - dt/2 M)^-1 dt B,  M the state matrix of pairs

    **C is the readout of the truncated kernel**, C (1 - A_bar^l_kernel), which is what S4 trains and stores;
    `dplr_truncate` makes it from a plain C and `dplr_dense` takes it back. A, B, C and each P hold one of every
    conjugate pair; the low-rank term acts on the whole pairs.

    Args:
        A: (d, d_state) complex, negative real part.
        P: (rank, d, d_state) complex, rank 1 or 2.
        B: broadcasts to A.
        C: (..., d, d_state) complex.
        dt: (d,) positive; its dtype decides that of the kernel.
        length: positions, 1 .. l_kernel.
        l_kernel: the length that C was truncated for; None is `length`.

    Returns:
        (..., d, length) float32 (float64 for float64 dt).

    Raises:
        UnsupportedInput: shapes or dtypes do not fit, or length is longer than l_kernel.

    Source: Gu et al. 2022 (S4, arXiv 2111.00396), algorithm 1, rearranged without its pole at w = -1.
    """
    _check(A, B, C, dt, length)
    if not A.is_complex() or dt.dim() != 1:
        raise UnsupportedInput(f"A must be complex and dt of shape (d,), got {A.dtype} and {tuple(dt.shape)}")
    if P.dim() != 3 or P.shape[0] not in (1, 2) or P.shape[1:] != A.shape:
        raise UnsupportedInput(f"P must have shape (1 or 2, *{tuple(A.shape)}) like A, got {tuple(P.shape)}")
    l_kernel = length if l_kernel is None else l_kernel
    if length > l_kernel:
        raise UnsupportedInput(
            f"length {length} is beyond the {l_kernel} positions that C was truncated for; "
            "take it back with dplr_dense and truncate it for the new length"
        )
    run = DPLR.choose(dplr_facts(A, P, B, C, dt, length), form, backend)
    return run(A, P, B, C, dt, length, l_kernel=l_kernel)


def _check(A: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int) -> None:
    if A.dim() != 2 or 0 in A.shape:
        raise UnsupportedInput(f"A must have shape (d, d_state), got {tuple(A.shape)}")
    if C.dim() < 2 or C.shape[-2:] != A.shape:
        raise UnsupportedInput(f"C must have shape (..., {A.shape[0]}, {A.shape[1]}) like A, got {tuple(C.shape)}")
    if B.dim() > 2 or any(b not in (1, a) for a, b in zip(reversed(A.shape), reversed(B.shape))):
        raise UnsupportedInput(f"B must broadcast to the shape of A {tuple(A.shape)}, got {tuple(B.shape)}")
    if tuple(dt.shape) not in (tuple(A.shape[:1]), tuple(A.shape)) or not dt.is_floating_point():
        raise UnsupportedInput(
            f"dt must be real, of shape ({A.shape[0]},) or {tuple(A.shape)}, got {dt.dtype} {tuple(dt.shape)}"
        )
    if not A.is_complex() and (B.is_complex() or C.is_complex()):
        raise UnsupportedInput("B and C are complex but A is real; make A complex too")
    if any(t.device != dt.device for t in (A, B, C)):
        raise UnsupportedInput("A, B, C and dt must be on one device; move them with .to(dt.device)")
    if length < 1:
        raise UnsupportedInput(f"length must be at least 1, got {length}")
