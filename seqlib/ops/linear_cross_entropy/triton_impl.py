"""Cross entropy of a linear map with the softmax of each row, and its gradient, in one Triton kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from seqlib.dispatch import Facts, Verdict
from seqlib.ops import triton_common as common
from seqlib.ops.linear_cross_entropy import torch_impl
from seqlib.ops.linear_cross_entropy import triton_kernels as kernels
from seqlib.ops.linear_cross_entropy.torch_impl import Shape, over_chunks

__all__ = ["gate", "linear_cross_entropy", "losses"]


class Plan(NamedTuple):
    """Logits of a tile and num_warps."""

    tile: int
    warps: int


PLANS = [Plan(4096, 8), Plan(1024, 4)]


def gate(facts: Facts) -> Verdict:
    """Admit a plan for the dtype of a call on its device."""
    x, weight = (torch.randn(n, 64, dtype=facts.dtype, device=facts.device) / 4 for n in (9, 5003))
    targets = torch.arange(9, device=facts.device) * 500 - 1
    options = {"divisor": torch.full((), 8, device=facts.device), "ignore_index": -1, "scale": 2.0, "softcap": 3.0}
    inputs = {"x": x, "weight": weight, "targets": targets, **options}

    def trial() -> str:
        return common.trial(linear_cross_entropy, torch_impl.linear_cross_entropy, inputs)

    return common.admit(_name(facts.dtype, common.capability(torch.device(facts.device))), PLANS, trial)


def _name(dtype: torch.dtype, arch: int) -> str:
    return common.configuration("linear_cross_entropy", dtype, arch)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    divisor: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float | None,
) -> Tensor:
    return over_chunks(_in_place, x, weight, targets, divisor, ignore_index, Shape(scale, softcap))


def _in_place(
    logits: Tensor, targets: Tensor, divisor: Tensor, ignore_index: int, shape: Shape, needs_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    loss = _losses(logits, targets, divisor, ignore_index, shape.scale, shape.softcap, needs_gradient)
    return loss, logits if needs_gradient else None


def losses(
    logits: Tensor,
    targets: Tensor,
    divisor: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float | None,
    needs_gradient: bool,
) -> Tensor:
    """The sum of the losses; where it is needed, the gradient of the logits takes their place."""
    plan = common.chosen(_name(logits.dtype, common.capability(logits.device)), PLANS)
    rows, words = logits.shape
    each = torch.empty(rows, dtype=torch.float32, device=logits.device)
    common.launch(
        kernels.losses,
        (rows,),
        *(logits, targets.contiguous(), divisor, each, logits.stride(0), ignore_index),
        *(float(scale), float(softcap or 1.0)),
        V=words,
        B=min(plan.tile, triton.next_power_of_2(words)),
        CAPPED=softcap is not None,
        GRADIENT=needs_gradient,
        num_warps=plan.warps,
        num_stages=1,
    )
    return each.sum()


_losses = torch.library.custom_op("seqlib_triton::linear_cross_entropy", losses, mutates_args=("logits",))


@_losses.register_fake
def _(
    logits: Tensor,
    targets: Tensor,
    divisor: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float | None,
    needs_gradient: bool,
) -> Tensor:
    return logits.new_empty((), dtype=torch.float32)
