"""Root-mean-square normalisation, optionally gated."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from seqlib.context import undisturbed
from seqlib.dispatch import Facts, Impl, Op
from seqlib.errors import UnsupportedInput

__all__ = ["IMPLS", "OP", "rms_norm", "unit_length"]

_HERE = "seqlib.ops.norm"


def _one_tile(facts: Facts) -> str | None:
    width = facts.size("group_size")
    return None if width <= 1 << 13 else f"groups have {width} features; it takes up to {1 << 13}"


IMPLS = (
    Impl(
        "triton",
        "parallel",
        f"{_HERE}.triton_impl:rms_norm",
        devices=("cuda",),
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        needs=("triton>=3.6",),
        limits=_one_tile,
        gate=f"{_HERE}.triton_impl:gate",
    ),
    Impl(
        "native",
        "parallel",
        f"{_HERE}.native_impl:rms_norm",
        devices=("cpu",),
        dtypes=(torch.float32, torch.bfloat16),
        needs=("native",),
    ),
    Impl("torch", "parallel", f"{_HERE}.torch_impl:rms_norm"),
    Impl("reference", "reference", f"{_HERE}.reference:rms_norm"),
)


def facts(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    group_size: int | None = None,
    **_: Any,
) -> Facts:
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, gate))
    sizes = (("group_size", group_size or x.shape[-1]),)
    return Facts(x.device.type, x.dtype, x.shape[-2] if x.dim() > 1 else 1, needs_grad, sizes=sizes)


OP = Op("norm", IMPLS, facts, "rms_norm")


@undisturbed
def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    *,
    gate: Tensor | None = None,
    norm_before_gate: bool = False,
    group_size: int | None = None,
    eps: float = 1e-5,
    form: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """Divide each group of features by its root mean square, scale it, and gate it.

        norm_before_gate=False:  y = rms(x * silu(gate)) * weight
        norm_before_gate=True:   y = rms(x) * weight * silu(gate)
        rms(v) = v / sqrt(mean(v^2) + eps), mean over `group_size` contiguous features

    Computed in float32 (float64 for float64 inputs) and returned in the dtype of x.

    Args:
        x: (..., d).
        weight: (d,), any float dtype; None for a weightless norm.
        gate: the shape and dtype of x; None for no gate.
        group_size: divides d; None is the whole width.

    Returns:
        (..., d) in the dtype of x.

    Raises:
        UnsupportedInput: shapes, dtypes or devices do not fit.

    Source: Zhang and Sennrich 2019, eq. 4; the two orders of the gate are those of Mamba-2 (state-spaces/mamba,
    layernorm_gated.py), whose eps of 1e-5 is the default here.
    """
    d = x.shape[-1]
    if weight is not None and tuple(weight.shape) != (d,):
        raise UnsupportedInput(f"weight must have shape ({d},) like the last axis of x, got {tuple(weight.shape)}")
    if gate is not None and (gate.shape != x.shape or gate.dtype != x.dtype):
        raise UnsupportedInput(
            f"gate must match x: {x.dtype} {tuple(x.shape)}, got {gate.dtype} {tuple(gate.shape)}; cast or reshape it"
        )
    if any(t is not None and t.device != x.device for t in (weight, gate)):
        raise UnsupportedInput("x, weight and gate must be on one device; move them with .to(x.device)")
    if group_size is not None and (group_size < 1 or d % group_size):
        raise UnsupportedInput(f"group_size must divide d={d}, got {group_size}")
    run = OP.choose(facts(x, weight, gate=gate, group_size=group_size), form, backend)
    return run(x, weight, gate=gate, norm_before_gate=norm_before_gate, group_size=group_size, eps=eps)


def unit_length(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum of squares + eps) over the last axis, from the norm of mean squares."""
    d = x.shape[-1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    if torch.compiler.is_compiling():  # a traced tensor must not stay behind
        scale = x.new_full((d,), d**-0.5, dtype=dtype)
    else:
        scale = _unit_scale(d, dtype, x.device)
    return rms_norm(x, scale, eps=eps / d)


@functools.lru_cache(maxsize=1024)
def _unit_scale(d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # autograd could not save it later
        return torch.full((d,), d**-0.5, dtype=dtype, device=device)
