"""Long causal convolution of every channel with its own kernel, in one or both directions, with a state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqlib.context import undisturbed
from seqlib.dispatch import Facts, Impl, Op
from seqlib.errors import UnsupportedInput
from seqlib.ops.long_conv.online import OnlineConv, OnlineState
from seqlib.ops.long_conv.sparse import SparseConv, SparseState
from seqlib.sequence import SequenceInfo

__all__ = [
    "IMPLS",
    "OP",
    "STEP",
    "STEP_IMPLS",
    "OnlineConv",
    "OnlineState",
    "SparseConv",
    "SparseState",
    "long_conv",
    "step",
]

_HERE = "seqlib.ops.long_conv"
IMPLS = (
    Impl(
        "native",
        "parallel",
        f"{_HERE}.native_impl:long_conv",
        devices=("cpu",),
        dtypes=(torch.float32, torch.bfloat16),
        needs=("native",),
    ),
    Impl("torch", "parallel", f"{_HERE}.torch_impl:long_conv"),
    Impl("reference", "reference", f"{_HERE}.reference:long_conv"),
)
STEP_IMPLS = (Impl("torch", "recurrent", f"{_HERE}.torch_impl:step", grad=False),)


def facts(
    x: Tensor,
    kernel: Tensor,
    *,
    D: Tensor | None = None,
    reverse_kernel: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq: SequenceInfo | None = None,
    **_: Any,
) -> Facts:
    tensors = (x, kernel, D, reverse_kernel, initial_state)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    used = {
        "bidirectional": reverse_kernel is not None,
        "initial_state": initial_state is not None,
        "packed": seq is not None and seq.starts is not None,
        "padded": seq is not None and seq.padding_mask is not None,
    }
    seqlen = x.shape[1] if x.dim() == 3 else 1
    return Facts(
        x.device.type,
        x.dtype,
        seqlen,
        needs_grad,
        frozenset(name for name, on in used.items() if on),
        (("length", kernel.shape[-1]),),
    )


OP = Op("long_conv", IMPLS, facts, "long_conv")
STEP = Op("long_conv", STEP_IMPLS, facts, "step")


@undisturbed
def long_conv(
    x: Tensor,
    kernel: Tensor,
    *,
    D: Tensor | None = None,
    reverse_kernel: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq: SequenceInfo | None = None,
    form: str = "auto",
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Convolve every channel with its own kernel.

        y[t] = D x[t] + sum_{j=0}^{length-1} kernel[:, j] x[t - j] + sum_{j>=0} reverse_kernel[:, j] x[t + 1 + j]

    **The reverse kernel begins at lag -1**, so that lag 0 is counted once (S4, SGConv). Layers whose two kernels share
    lag 0 (Hyena, Mega, S5) pass `reverse_kernel[:, 1:]` and add `reverse_kernel[:, 0]` to D; from there to here the
    reverse kernel moves by one. Computed in float32 (float64 for float64 inputs), under autocast too, and returned in
    the dtype of x. Differentiable in every tensor, through the final state as well.

    Args:
        x: (batch, seqlen, d), seqlen >= 1.
        kernel: (d, length), any real float dtype, length >= 1; longer or shorter than the sequence. Column j is lag j.
        D: (d,), skip weight.
        reverse_kernel: (d, any length >= 1); makes the convolution see what follows. It then has no state.
        initial_state: (batch, length - 1, d) in the dtype of x, the inputs before the span, oldest first; None for
            zeros. Not with `reverse_kernel`.
        seq: documents and padding. No lag crosses the start of a document, in either direction; a padded position is
            as if it were not there and its output is zero.

    Returns:
        y: (batch, seqlen, d) in the dtype of x.
        final_state: (batch, length - 1, d) in the dtype of x, the last inputs, oldest first, zeros where the document
            has fewer; with it the next span continues exactly. None with `reverse_kernel`.

    Raises:
        UnsupportedInput: shapes, dtypes or devices do not fit, or a state comes with a reverse kernel.

    Cost: O(batch d n log n) with n about seqlen + length. Gradients keep the inputs, not the spectra.

    Source: Gu et al. 2022 (arXiv 2111.00396), section 2.4 and, for two directions, the packing of state-spaces/s4
    (models/s4/s4.py, FFTConv).
    """
    if x.dim() != 3 or 0 in x.shape:
        raise UnsupportedInput(f"x must have shape (batch, seqlen, d), none of them 0, got {tuple(x.shape)}")
    _check(x, kernel, D, initial_state, "initial_state")
    if reverse_kernel is not None:
        _check_kernel(x, reverse_kernel, "reverse_kernel")
        if initial_state is not None:
            raise UnsupportedInput(
                "initial_state cannot go with reverse_kernel: outputs before this span would need its inputs; "
                "give the whole sequence at once, or drop the reverse kernel"
            )
    if seq is not None:
        seq.check(x.shape[0], x.shape[1])
    options = {"D": D, "reverse_kernel": reverse_kernel, "initial_state": initial_state, "seq": seq}
    return OP.choose(facts(x, kernel, **options), form, backend)(x, kernel, **options)  # type: ignore[arg-type]


@undisturbed
def step(x: Tensor, kernel: Tensor, state: Tensor, *, D: Tensor | None = None, backend: str = "auto") -> Tensor:
    """One position of `long_conv`, for decoding: **writes the new input into `state`** and has no gradient.

    It reads the whole kernel and state, O(batch d length). `OnlineConv` does the same in O(log^2 length) amortised.

    Args:
        x: (batch, d).
        kernel, D: as in `long_conv`.
        state: (batch, length - 1, d) in the dtype of x, oldest first; shifted in place by one input.

    Returns:
        y: (batch, d) in the dtype of x.

    Raises:
        UnsupportedInput: shapes, dtypes or devices do not fit.
    """
    if x.dim() != 2 or 0 in x.shape:
        raise UnsupportedInput(f"x must have shape (batch, d), none of them 0, got {tuple(x.shape)}")
    _check(x, kernel, D, state, "state")
    run = STEP.choose(facts(x, kernel, D=D, initial_state=state), backend=backend)
    return run(x, kernel, state, D=D)


def _check(x: Tensor, kernel: Tensor, D: Tensor | None, state: Tensor | None, name: str) -> None:
    if not x.is_floating_point():
        raise UnsupportedInput(f"x must be a real floating-point tensor, got {x.dtype}")
    _check_kernel(x, kernel, "kernel")
    d = x.shape[-1]
    if D is not None and (tuple(D.shape) != (d,) or D.device != x.device or not D.is_floating_point()):
        raise UnsupportedInput(
            f"D must be a float tensor of shape ({d},) on {x.device}, got {D.dtype} {tuple(D.shape)} on {D.device}"
        )
    wanted = (x.shape[0], kernel.shape[1] - 1, d)
    if state is not None and (tuple(state.shape) != wanted or state.dtype != x.dtype or state.device != x.device):
        raise UnsupportedInput(
            f"{name} must be (batch, length - 1, d) = {wanted} {x.dtype} on {x.device} like x, "
            f"got {tuple(state.shape)} {state.dtype} on {state.device}"
        )


def _check_kernel(x: Tensor, kernel: Tensor, name: str) -> None:
    d = x.shape[-1]
    if kernel.dim() != 2 or kernel.shape[0] != d or kernel.shape[1] < 1 or not kernel.is_floating_point():
        raise UnsupportedInput(
            f"{name} must be a float tensor of shape (d={d}, length >= 1), got {kernel.dtype} {tuple(kernel.shape)}"
        )
    if kernel.device != x.device:
        raise UnsupportedInput(f"{name} must be on {x.device} like x, got {kernel.device}; move it with .to(x.device)")
