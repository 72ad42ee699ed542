"""Kernelized attention with relative positions: products of features, weighted by the exponential of a learned bias."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from seqlib.context import undisturbed
from seqlib.dispatch import Facts, Impl, Op
from seqlib.errors import UnsupportedInput
from seqlib.ops.rpe_attention.decode import step
from seqlib.ops.rpe_attention.exponentials import Exponentials, fit_exponentials
from seqlib.ops.rpe_attention.state import ExponentialState, WindowState, check_state
from seqlib.sequence import SequenceInfo

__all__ = [
    "IMPLS",
    "OP",
    "ExponentialState",
    "Exponentials",
    "WindowState",
    "fit_exponentials",
    "rpe_attention",
    "step",
]


def _transform_is_faster(facts: Facts) -> str | None:
    sizes = dict(facts.sizes)
    n, p, seqlen = sizes["d_feature"], sizes["headdim"], facts.seqlen
    window = min(sizes["window"], seqlen)
    pairs = (seqlen - window / 2) * window * (1 + ("bidirectional" in facts.features))
    length = seqlen + window
    # Measured on one core: a pair costs 0.02 ns for each feature and value and 2 ns more, a butterfly 2 ns.
    if pairs * (100 + n + p) > 100 * n * p * length * math.log2(length):
        return f"{seqlen} tokens under a window of {sizes['window']} at widths {n} and {p} are faster by transforms"
    return None


_HERE = "seqlib.ops.rpe_attention"
IMPLS = (
    Impl("torch", "chunked", f"{_HERE}.torch_impl:rpe_attention_direct", auto_limits=_transform_is_faster),
    Impl("torch", "parallel", f"{_HERE}.torch_impl:rpe_attention_fft"),
    Impl("reference", "reference", f"{_HERE}.reference:rpe_attention"),
)


def facts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    *,
    causal: bool = True,
    state: WindowState | ExponentialState | None = None,
    seq: SequenceInfo | None = None,
    **_: Any,
) -> Facts:
    tensors = [q, k, v, bias, *(() if state is None else state.tensors())]
    used = {
        "bidirectional": not causal,
        "initial_state": state is not None,
        "packed": seq is not None and seq.starts is not None,
        "padded": seq is not None and seq.padding_mask is not None,
    }
    window = bias.shape[-1] if causal else (bias.shape[-1] + 1) // 2
    return Facts(
        q.device.type,
        q.dtype,
        q.shape[1],
        torch.is_grad_enabled() and any(t.requires_grad for t in tensors),
        frozenset(name for name, given in used.items() if given),
        (("window", window), ("d_feature", q.shape[-1]), ("headdim", v.shape[-1])),
    )


OP = Op("rpe_attention", IMPLS, facts, "rpe_attention")


@undisturbed
def rpe_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    *,
    causal: bool = True,
    exponentials: Exponentials | None = None,
    state: WindowState | ExponentialState | None = None,
    seq: SequenceInfo | None = None,
    form: str = "auto",
    backend: str = "auto",
) -> tuple[Tensor, WindowState | ExponentialState]:
    """Average the values by products of features times a weight that depends on the distance.

        y_i = sum_j exp(b_{i-j}) (q_i . k_j) v_j / sum_j exp(b_{i-j}) (q_i . k_j),     0 <= i - j < window
        causal=False: |i - j| < window

    Computed in float32 (float64 for float64 inputs); differentiable in every tensor. A bias more than 16 below the
    largest of its head counts as 16 below. The weights are those of a Toeplitz matrix, so long sequences go through
    transforms, in float64, since their rounding is relative to the largest sum; where windows or sequences are shorter
    the direct form is faster, with widths of 64 as far as a hundred thousand tokens.

    Args:
        q, k: (batch, seqlen, nheads, d_feature), features phi(q), phi(k) whose products are positive.
        v: (batch, seqlen, nheads, headdim), in the dtype of q and k.
        bias: (nheads, window) by distance i - j from 0; for causal=False (nheads, 2 window - 1), from -(window - 1).
        causal: False lets tokens see those after them; only without a state.
        exponentials: what `fit_exponentials` made of this bias. Then spans are exact inside, but what they hand on,
            and beyond the window too, is the fitted sum: a state of fixed size. None hands on the window, exactly.
        state: what came before, an ExponentialState with exponentials and a WindowState without; None is nothing.
        seq: documents and padding.

    Returns:
        y (batch, seqlen, nheads, headdim) in the dtype of v, zero at padding, and the state after the last token.

    Raises:
        UnsupportedInput: shapes, dtypes, devices or the state do not fit.

    Cost: direct 2 batch nheads (d_feature + headdim) FLOPs per pair of query and visible key; transforms about
    d_feature headdim seqlen log(seqlen) per head. Memory is linear in seqlen.

    Source: Luo et al. 2021 (arXiv 2106.12566), section 3.
    """
    window = _check(q, k, v, bias, causal)
    if exponentials is not None and (not causal or exponentials.rates.shape[0] != q.shape[2]):
        raise UnsupportedInput(
            f"exponentials are for causal=True and {q.shape[2]} heads, got causal={causal} and "
            f"{exponentials.rates.shape[0]} heads"
        )
    if state is not None:
        if not causal:
            raise UnsupportedInput("causal=False sees the whole sequence at once and takes no state; pass state=None")
        check_state(state, q, v, window, exponentials)
    if seq is not None:
        seq.check(q.shape[0], q.shape[1])
        if seq.group is not None:
            raise UnsupportedInput("rpe_attention runs on one process; gather the sequence over seq.group first")
    run = OP.choose(facts(q, k, v, bias, causal=causal, state=state, seq=seq), form, backend)
    return run(q, k, v, bias, causal=causal, exponentials=exponentials, state=state, seq=seq)


def _check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, causal: bool) -> int:
    """The window of the bias, if all inputs fit."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if any(t.dim() != 4 for t in (q, k, v)) or 0 in q.shape or q.shape != k.shape or v.shape[:3] != q.shape[:3]:
        raise UnsupportedInput(
            f"q and k must be (batch, seqlen, nheads, d_feature), v (batch, seqlen, nheads, headdim), got {shapes}"
        )
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise UnsupportedInput(f"q, k, v must have one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}; cast them")
    width = bias.shape[-1] if bias.dim() == 2 else 0
    if bias.dim() != 2 or bias.shape[0] != q.shape[2] or width < 1 or not bias.is_floating_point():
        raise UnsupportedInput(f"bias must be real, (nheads={q.shape[2]}, width), got {bias.dtype} {tuple(bias.shape)}")
    if not causal and width % 2 == 0:
        raise UnsupportedInput(f"a bidirectional bias has 2 window - 1 distances, an odd number, got {width}")
    if any(t.device != q.device for t in (k, v, bias)):
        raise UnsupportedInput(f"every tensor must be on the device of q, {q.device}; move them")
    return width if causal else (width + 1) // 2
