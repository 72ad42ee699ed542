"""Rotation of pairs of features by angles that grow with the position: rotary embeddings and LRPE."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from seqlib.context import counted, undisturbed
from seqlib.dispatch import Facts, Impl, Op
from seqlib.errors import UnsupportedInput

__all__ = ["IMPLS", "OP", "PAIRS", "rotate"]

PAIRS = ("halves", "neighbours", "doubled")
FEW_TOKENS = 8
_HERE = "seqlib.ops.rotate"


def _one_tile(facts: Facts) -> str | None:
    width = facts.size("headdim")
    return None if width <= 1024 else f"heads have {width} features; it takes up to 1024"


def _few_tokens(facts: Facts) -> str | None:
    tokens = facts.size("tokens")
    return None if tokens <= FEW_TOKENS else f"{tokens} tokens; it takes {FEW_TOKENS} at most"


IMPLS = (
    Impl(
        "native",
        "parallel",
        f"{_HERE}.native_impl:rotate",
        devices=("cpu",),
        dtypes=(torch.float32, torch.bfloat16),
        needs=("native",),
        limits=_few_tokens,
        grad=False,
        refuses=frozenset({"doubled", "angles for each head", "positions that broadcast", "other dtypes of angles"}),
    ),
    Impl(
        "triton",
        "parallel",
        f"{_HERE}.triton_impl:rotate",
        devices=("cuda",),
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        needs=("triton>=3.6",),
        limits=_one_tile,
        gate=f"{_HERE}.triton_impl:gate",
    ),
    Impl("torch", "parallel", f"{_HERE}.torch_impl:rotate"),
    Impl("reference", "reference", f"{_HERE}.reference:rotate"),
)


def facts(q: Tensor, k: Tensor, theta: Tensor, positions: Tensor, *, pairs: str = "halves", **_: Any) -> Facts:
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, theta))
    used = {
        pairs: True,
        "angles for each head": theta.dim() > 1,
        "positions that broadcast": torch.compiler.is_exporting() or positions.shape != q.shape[:-2],
        "other dtypes of angles": theta.dtype != torch.float32 or positions.dtype != torch.int64,
    }
    tokens = math.prod(q.shape[:-2])
    sizes = (("headdim", q.shape[-1]), ("angles", theta.shape[-1]), ("tokens", min(counted(tokens), FEW_TOKENS + 1)))
    features = frozenset(name for name, given in used.items() if given)
    return Facts(q.device.type, q.dtype, q.shape[-3], needs_grad, features, sizes)


OP = Op("rotate", IMPLS, facts, "rotate")


@undisturbed
def rotate(
    q: Tensor,
    k: Tensor,
    theta: Tensor,
    positions: Tensor,
    *,
    pairs: str = "halves",
    form: str = "auto",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Turn pairs of features of every head by `position * theta`, so that products of q and k see distances only.

        (a, b) -> (a cos - b sin, b cos + a sin)   of the angle  position * theta_i,  i < angles

        halves:      a = x_i, b = x_(i + angles)
        neighbours:  a = x_(2i), b = x_(2i + 1)
        doubled:     a = x_i, b = 0, and the result is twice as wide: (x cos, x sin)

    What is left of a head beyond 2 angles features passes. Angles, sines and cosines are float32 (float64 where theta
    is), and the product is returned in the dtype of x. Differentiable in q, k and theta.

    Args:
        q: (..., nheads, headdim), a floating dtype.
        k: (..., nheads_kv, headdim).
        theta: (angles,), or (nheads, angles) with an angle for each head, which q and k must then both have; at most
            headdim / 2 of them, or headdim where doubled.
        positions: integers that broadcast to the leading dimensions of q.
        pairs: "halves", "neighbours" or "doubled".

    Returns:
        q and k turned.

    Raises:
        UnsupportedInput: shapes or devices do not fit.

    Source: Su et al. 2021 (arXiv 2104.09864), eq. 34; doubled: Qin et al. 2023 (LRPE, arXiv 2307.09270), section 3.
    """
    _check(q, k, theta, positions, pairs)
    return OP.choose(facts(q, k, theta, positions, pairs=pairs), form, backend)(q, k, theta, positions, pairs=pairs)


def _check(q: Tensor, k: Tensor, theta: Tensor, positions: Tensor, pairs: str) -> None:
    if pairs not in PAIRS:
        raise UnsupportedInput(f"pairs must be one of {', '.join(PAIRS)}, got {pairs!r}")
    angles, fits = theta.shape[-1], q.shape[-1] if pairs == "doubled" else q.shape[-1] // 2
    if angles != fits if pairs == "doubled" else not 0 < angles <= fits:
        known = f"{fits} angles" if pairs == "doubled" else f"1 to {fits} angles"
        raise UnsupportedInput(f"{pairs} of headdim {q.shape[-1]} take {known}, got theta {tuple(theta.shape)}")
    for name, x in (("q", q), ("k", k)):
        if x.dim() < 3 or x.shape[:-2] != q.shape[:-2] or x.shape[-1] != q.shape[-1]:
            raise UnsupportedInput(
                f"{name} must be (..., heads, headdim) like q, got {tuple(x.shape)} beside {tuple(q.shape)}"
            )
        if theta.dim() == 2 and theta.shape[0] != x.shape[-2]:
            raise UnsupportedInput(
                f"theta has angles for {theta.shape[0]} heads and {name} has {x.shape[-2]}; give one row for each head"
            )
        if not x.device == theta.device == positions.device:
            raise UnsupportedInput(
                f"{name}, theta and positions must be on one device, got {x.device}, {theta.device}, {positions.device}"
            )
