"""First-order linear recurrence, element by element: the base of LRU, S5 and gated linear recurrent units."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqlib.context import undisturbed
from seqlib.dispatch import Facts, Impl, Op
from seqlib.errors import UnsupportedInput
from seqlib.ops.linear_scan.summary import combine, summarize
from seqlib.sequence import SequenceInfo

__all__ = ["IMPLS", "OP", "combine", "linear_scan", "summarize"]

_HERE = "seqlib.ops.linear_scan"
_DTYPES = (torch.float32, torch.bfloat16, torch.complex64)
IMPLS = (
    Impl(
        "native",
        "chunked",
        f"{_HERE}.native_impl:linear_scan",
        devices=("cpu",),
        dtypes=_DTYPES,
        needs=("native",),
        refuses=frozenset({"mixed precision", "float16"}),
    ),
    Impl(
        "native",
        "chunked",
        f"{_HERE}.native_impl:linear_scan",
        devices=("cuda",),
        dtypes=(*_DTYPES, torch.float16),
        needs=("native:cuda",),
        refuses=frozenset({"mixed precision"}),
    ),
    Impl("torch", "chunked", f"{_HERE}.torch_impl:linear_scan"),
    Impl("reference", "reference", f"{_HERE}.reference:linear_scan"),
)


def facts(a: Tensor, b: Tensor, *, initial_state: Tensor | None = None, **_: Any) -> Facts:
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (a, b, initial_state))
    dtype = torch.promote_types(a.dtype, b.dtype) if a.is_complex() else b.dtype
    odd = {torch.float16: "float16"} | dict.fromkeys((torch.float64, torch.complex32), "mixed precision")
    features = frozenset(odd[t.dtype] for t in (a, b) if t.dtype in odd)
    return Facts(b.device.type, dtype, b.shape[1], needs_grad, features)


OP = Op("linear_scan", IMPLS, facts, "linear_scan")


@undisturbed
def linear_scan(
    a: Tensor,
    b: Tensor,
    *,
    initial_state: Tensor | None = None,
    reverse: bool = False,
    seq: SequenceInfo | None = None,
    form: str = "auto",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run the recurrence along the second axis.

        h_t = a_t * h_{t-1} + b_t                (reverse: h_t = a_t * h_{t+1} + b_t, from the last position down)

    Computed in float32 or complex64 (64-bit inputs: float64, complex128).

    Args:
        a: decays, real or complex, any shape that broadcasts to the shape of b.
        b: (batch, seqlen, ...) inputs, real or complex.
        initial_state: (batch, ...), the state before the first position (reverse: after the last); None is zero.
        reverse: scan from right to left. Documents still begin where `seq.starts` says.
        seq: documents and padding; h is zero at padded positions.

    Returns:
        h, the shape of b, in the dtype of b (complex if a or b is), and the final state (batch, ...) in the dtype of
        the computation: after the last position, or with `reverse` at the first one.

    Raises:
        UnsupportedInput: shapes, dtypes or devices do not fit.

    Cost: one multiply-add per element, bound by memory.

    Source: Blelloch 1990, section 1.4; Smith et al. 2023 (S5), section 2.2.
    """
    if b.dim() < 2 or b.numel() == 0:
        raise UnsupportedInput(f"b must be (batch, seqlen, ...) and not empty, got {tuple(b.shape)}")
    batch, seqlen = b.shape[:2]
    for name, t in (("a", a), ("b", b), ("initial_state", initial_state)):
        if t is not None and not (t.is_floating_point() or t.is_complex()):
            raise UnsupportedInput(f"{name} must be real or complex floating point, got {t.dtype}")
        if t is not None and t.device != b.device:
            raise UnsupportedInput(f"{name} is on {t.device} and b on {b.device}; move them with .to(b.device)")
    if a.dim() > b.dim() or any(n not in (1, m) for n, m in zip(a.shape[::-1], b.shape[::-1])):
        raise UnsupportedInput(f"a of shape {tuple(a.shape)} does not broadcast to the shape of b, {tuple(b.shape)}")
    if initial_state is not None:
        if tuple(initial_state.shape) != (batch, *b.shape[2:]):
            raise UnsupportedInput(
                f"initial_state must have shape {(batch, *b.shape[2:])}, got {tuple(initial_state.shape)}"
            )
        if initial_state.is_complex() and not (a.is_complex() or b.is_complex()):
            raise UnsupportedInput(
                "initial_state is complex but a and b are real; make b complex with b.to(torch.cfloat)"
            )
    if seq is not None:
        seq.check(batch, seqlen)
    run = OP.choose(facts(a, b, initial_state=initial_state), form, backend)
    return run(a, b, initial_state=initial_state, reverse=reverse, seq=seq)
