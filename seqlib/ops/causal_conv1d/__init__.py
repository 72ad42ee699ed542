"""Short causal depthwise convolution with a state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from seqlib.context import undisturbed
from seqlib.dispatch import Facts, Impl, Op
from seqlib.errors import UnsupportedInput
from seqlib.sequence import SequenceInfo

__all__ = ["IMPLS", "OP", "STEP", "STEP_IMPLS", "causal_conv1d", "step"]

_HERE = "seqlib.ops.causal_conv1d"
_NATIVE_WIDTH = 8


def _narrow(facts: Facts) -> str | None:
    d_conv = facts.size("d_conv")
    return None if d_conv <= _NATIVE_WIDTH else f"d_conv is {d_conv}; it takes up to {_NATIVE_WIDTH}"


def _vendor_sizes(facts: Facts) -> str | None:
    d_conv, d = facts.size("d_conv"), facts.size("d")
    if not 2 <= d_conv <= 4:
        return f"d_conv is {d_conv}; it takes 2 to 4"
    return None if d % 8 == 0 else f"d is {d}; it takes multiples of 8"


_NATIVE: dict[str, Any] = {
    "devices": ("cpu",),
    "dtypes": (torch.float32, torch.bfloat16),
    "needs": ("native",),
    "limits": _narrow,
}
_CUDA: dict[str, Any] = {
    "devices": ("cuda",),
    "dtypes": (torch.float32, torch.bfloat16, torch.float16),
    "needs": ("native:cuda",),
    "limits": _narrow,
}
IMPLS = (
    Impl("native", "parallel", f"{_HERE}.native_impl:causal_conv1d", **_NATIVE),
    Impl("native", "parallel", f"{_HERE}.native_impl:causal_conv1d", **_CUDA),
    Impl(
        "vendor",
        "parallel",
        f"{_HERE}.vendor_impl:causal_conv1d",
        devices=("cuda",),
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        needs=("causal_conv1d",),
        limits=_vendor_sizes,
        refuses=frozenset({"packed", "padded"}),
        by_name_only=True,
    ),
    Impl("torch", "parallel", f"{_HERE}.torch_impl:causal_conv1d"),
    Impl("reference", "reference", f"{_HERE}.reference:causal_conv1d"),
)
STEP_IMPLS = (
    Impl("native", "recurrent", f"{_HERE}.native_impl:step", grad=False, **_NATIVE),
    Impl("native", "recurrent", f"{_HERE}.native_impl:step", grad=False, **_CUDA),
    Impl("torch", "recurrent", f"{_HERE}.torch_impl:step"),
    Impl("reference", "reference", f"{_HERE}.reference:step"),
)


def facts(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    seq: SequenceInfo | None = None,
    **_: Any,
) -> Facts:
    tensors = (x, weight, bias, initial_state)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    seqlen = x.shape[1] if x.dim() == 3 else 1
    used = {
        "initial_state": initial_state is not None,
        "packed": seq is not None and seq.starts is not None,
        "padded": seq is not None and seq.padding_mask is not None,
    }
    features = frozenset(name for name, on in used.items() if on)
    return Facts(
        x.device.type, x.dtype, seqlen, needs_grad, features, (("d_conv", weight.shape[1]), ("d", x.shape[-1]))
    )


OP = Op("causal_conv1d", IMPLS, facts, "causal_conv1d")
STEP = Op("causal_conv1d", STEP_IMPLS, facts, "step")


@undisturbed
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    seq: SequenceInfo | None = None,
    form: str = "auto",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Mix each channel with its own last d_conv inputs.

        y[t] = act(bias + sum_k weight[:, k] * x[t - (d_conv - 1) + k]),   k = 0 .. d_conv - 1

    Inputs before the span come from `initial_state`, or are zero. Sums are float32 (float64 for float64 inputs).

    Args:
        x: (batch, seqlen, d); seqlen >= 1. Any strides; the native row reads a slice of a wider projection in place.
        weight: (d, d_conv), any float dtype; weight[:, -1] multiplies the current input. d_conv >= 1.
        bias: (d,), any float dtype, or None.
        activation: None or "silu".
        initial_state: (batch, d_conv - 1, d) in the dtype of x, oldest first; None for zeros.
        seq: documents and padding. No tap crosses the start of a document; a padded position is as if it were not
            there and its output is zero.

    Returns:
        y: (batch, seqlen, d) in the dtype of x.
        final_state: (batch, d_conv - 1, d), the last real inputs of each row, oldest first, and zeros where its last
            document has fewer. It keeps the dtype of x, since it holds inputs and not sums.

    Raises:
        UnsupportedInput: shapes, dtypes, devices or the activation do not fit.

    Source: the operator of Dao-AILab/causal-conv1d (causal_conv1d_interface.py) with channels last.
    """
    if x.dim() != 3 or 0 in x.shape:
        raise UnsupportedInput(f"x must have shape (batch, seqlen, d), none of them 0, got {tuple(x.shape)}")
    batch, seqlen, _ = x.shape
    _check(x, weight, bias, activation)
    if initial_state is not None:
        _check_state(initial_state, "initial_state", x, batch, weight.shape[1])
    if seq is not None:
        seq.check(batch, seqlen)
    run = OP.choose(facts(x, weight, bias, initial_state=initial_state, seq=seq), form, backend)
    return run(x, weight, bias, activation=activation, initial_state=initial_state, seq=seq)


@undisturbed
def step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    *,
    activation: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """One position of `causal_conv1d`, for decoding. **Writes the new inputs into `state`.**

    The native row has no gradient; where one is needed, the torch row runs. Loops bind `STEP.choose(facts)` once.

    Args:
        x: (batch, d).
        weight, bias, activation: as in `causal_conv1d`.
        state: (batch, d_conv - 1, d), contiguous, in the dtype of x, oldest first; shifted in place by one input.

    Returns:
        y: (batch, d) in the dtype of x.

    Raises:
        UnsupportedInput: shapes, dtypes, devices or the activation do not fit.
    """

    def choose() -> Callable[..., Tensor]:
        if x.dim() != 2 or 0 in x.shape:
            raise UnsupportedInput(f"x must have shape (batch, d), none of them 0, got {tuple(x.shape)}")
        _check(x, weight, bias, activation)
        _check_state(state, "state", x, x.shape[0], weight.shape[1])
        return STEP.choose(facts(x, weight, bias, initial_state=state), backend=backend)

    run = choose() if torch.is_grad_enabled() else STEP.recall(backend, (x, weight, bias, state), choose, activation)
    if not state.is_contiguous():
        raise UnsupportedInput("state is written in place and must be contiguous; make it so once, with .contiguous()")
    return run(x, weight, bias, state, activation=activation)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    d = x.shape[-1]
    if weight.dim() != 2 or weight.shape[0] != d or weight.shape[1] < 1:
        raise UnsupportedInput(f"weight must have shape (d={d}, d_conv >= 1), got {tuple(weight.shape)}")
    if bias is not None and tuple(bias.shape) != (d,):
        raise UnsupportedInput(f"bias must have shape ({d},) like the last axis of x, got {tuple(bias.shape)}")
    if not all(t is None or t.is_floating_point() for t in (x, weight, bias)):
        raise UnsupportedInput("x, weight and bias must be real floating-point tensors; cast them with .float()")
    if any(t is not None and t.device != x.device for t in (weight, bias)):
        raise UnsupportedInput("x, weight and bias must be on one device; move them with .to(x.device)")
    if activation not in (None, "silu"):
        raise UnsupportedInput(f'activation must be None or "silu" (also called swish), got {activation!r}')


def _check_state(state: Tensor, name: str, x: Tensor, batch: int, d_conv: int) -> None:
    wanted = (batch, d_conv - 1, x.shape[-1])
    if tuple(state.shape) != wanted or state.dtype != x.dtype or state.device != x.device:
        raise UnsupportedInput(
            f"{name} must be (batch, d_conv - 1, d) = {wanted} {x.dtype} on {x.device} like x, "
            f"got {tuple(state.shape)} {state.dtype} on {state.device}"
        )
