"""Rotation of pairs of features by Triton kernels: q and k in one launch each way, sines and cosines in registers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from seqlib.dispatch import Facts, Verdict
from seqlib.ops import triton_common as common
from seqlib.ops.rotate import PAIRS, torch_impl
from seqlib.ops.rotate import triton_kernels as kernels
from seqlib.ops.triton_call import contiguous_rows

__all__ = ["gate", "rotate"]


class Plan(NamedTuple):
    """Features or angles of a tile, and num_warps."""

    elements: int
    warps: int


PLANS = (Plan(1024, 4), Plan(256, 4))


def gate(facts: Facts) -> Verdict:
    """Admit a plan for the pairs, sizes and dtype of a call on its device."""
    width, angles = facts.size("headdim"), facts.size("angles")
    pairs = next(name for name in PAIRS if name in facts.features)
    q, k = torch.randn(2, 3, 67, 2, width, dtype=facts.dtype, device=facts.device)
    per_head = int("angles for each head" in facts.features)
    theta = torch.rand(*[2] * per_head, angles, device=facts.device)
    inputs = {"q": q, "k": k, "theta": theta, "positions": torch.arange(67, device=facts.device)[None] % 40}

    def trial() -> str:
        return common.trial(rotate, torch_impl.rotate, inputs | {"pairs": pairs})

    arch = common.capability(torch.device(facts.device))
    return common.admit(_name(facts.dtype, arch, pairs, width, angles, per_head), PLANS, trial)


def _name(dtype: torch.dtype, arch: int, pairs: str, width: int, angles: int, per_head: int) -> str:
    return common.configuration("rotate", dtype, arch, pairs, f"{width}x{angles}", "per_head" if per_head else "shared")


def rotate(q: Tensor, k: Tensor, theta: Tensor, positions: Tensor, *, pairs: str) -> tuple[Tensor, Tensor]:
    lead = q.shape[:-2]
    positions = positions.expand(lead)
    if len(lead) != 2:
        positions = positions.reshape(1, -1)
    turned, other = _forward(_flat(q), _flat(k), theta.float(), positions, pairs)
    return turned.unflatten(0, lead), other.unflatten(0, lead)


def _flat(x: Tensor) -> Tensor:
    """(tokens, heads, headdim)"""
    return contiguous_rows(x.flatten(0, -3))


def forward(q: Tensor, k: Tensor, theta: Tensor, positions: Tensor, pairs: str) -> tuple[Tensor, Tensor]:
    """q and k (tokens, heads, headdim) turned, by positions (batch, seqlen) of as many tokens."""
    return _turn(q, k, theta, positions, pairs, back=False)


def gradients(
    dq: Tensor,
    dk: Tensor,
    q: Tensor | None,
    k: Tensor | None,
    theta: Tensor,
    positions: Tensor,
    pairs: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of theta only where q is given."""
    dq, dk = dq.contiguous(), dk.contiguous()
    made, other = _turn(dq, dk, theta, positions, pairs, back=True)
    if q is None or k is None:
        return made, other, theta.new_empty(0)
    tile = _tile(q, theta, pairs)
    parts = theta.new_empty(triton.cdiv(q.shape[0], tile["T"]), *theta.shape)
    common.launch(
        kernels.grad_theta,
        (parts.shape[0],),
        *(q, k, theta, positions, dq, dk, parts, *_sizes(q, k, positions), q.shape[2]),
        **tile,
    )
    return made, other, parts.sum(0)


def _turn(q: Tensor, k: Tensor, theta: Tensor, positions: Tensor, pairs: str, *, back: bool) -> tuple[Tensor, Tensor]:
    made, other = _room(q, pairs, back), _room(k, pairs, back)
    tile, width = _tile(made if back else q, theta, pairs), made.shape[2]
    common.launch(
        kernels.turn,
        (triton.cdiv(q.shape[0], tile["T"]),),
        *(q, k, theta, positions, made, other, *_sizes(q, k, positions), width),
        **tile,
        BACK=back,
    )
    return made, other


def _room(x: Tensor, pairs: str, back: bool) -> Tensor:
    width = x.shape[2] if pairs != "doubled" else x.shape[2] // 2 if back else 2 * x.shape[2]
    return x.new_empty(*x.shape[:2], width)


def _sizes(q: Tensor, k: Tensor, positions: Tensor) -> tuple[int, ...]:
    """Tokens, the length of rows of positions, strides of positions, q and k, and heads of both."""
    strides = *positions.stride(), *q.stride()[:2], *k.stride()[:2]
    return q.shape[0], positions.shape[1], *strides, q.shape[1], k.shape[1]


def _tile(q: Tensor, theta: Tensor, pairs: str) -> dict[str, Any]:
    angles, per_head = theta.shape[-1], theta.dim() == 2
    plan = common.chosen(_name(q.dtype, common.capability(q.device), pairs, q.shape[2], angles, per_head), PLANS)
    covers = triton.next_power_of_2(angles)
    rest = 0 if pairs == "doubled" else q.shape[2] - 2 * angles
    rest = triton.next_power_of_2(rest) if rest else 0
    return {
        "W": angles,
        "B": covers,
        "T": max(1, plan.elements // max(covers, rest)),
        "REST": rest,
        "PAIRS": pairs,
        "PER_HEAD": per_head,
        "num_warps": plan.warps,
        "num_stages": 1,
    }


_forward = torch.library.custom_op("seqlib_triton::rotate", forward, mutates_args=())
_gradients = torch.library.custom_op("seqlib_triton::rotate_bwd", gradients, mutates_args=())


@_forward.register_fake
def _(q: Tensor, k: Tensor, theta: Tensor, positions: Tensor, pairs: str) -> tuple[Tensor, Tensor]:
    return _room(q, pairs, False), _room(k, pairs, False)


@_gradients.register_fake
def _(
    dq: Tensor,
    dk: Tensor,
    q: Tensor | None,
    k: Tensor | None,
    theta: Tensor,
    positions: Tensor,
    pairs: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dtheta = theta.new_empty(0) if q is None else torch.empty_like(theta)
    return _room(dq, pairs, True), _room(dk, pairs, True), dtheta


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, theta, positions, ctx.pairs = inputs
    learned = ctx.needs_input_grad[2]
    ctx.save_for_backward(q if learned else None, k if learned else None, theta, positions)


def _backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    q, k, theta, positions = ctx.saved_tensors
    dq, dk, dtheta = _gradients(dq, dk, q, k, theta, positions, ctx.pairs)
    return dq, dk, None if q is None else dtheta, None, None


torch.library.register_autograd("seqlib_triton::rotate", _backward, setup_context=_save)
