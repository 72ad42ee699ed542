"""RMSNorm by Triton kernels: rows are read once forward and once backward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from seqlib.dispatch import Facts, Verdict
from seqlib.ops import triton_common as common
from seqlib.ops.norm import torch_impl
from seqlib.ops.norm import triton_kernels as kernels

__all__ = ["gate", "rms_norm"]

STRIPS = 528  # programs of the backward pass: four for each processor of an H100


class Plan(NamedTuple):
    """Elements of a tile and num_warps."""

    elements: int
    warps: int


def plans(group_size: int) -> list[Plan]:
    """Candidates, the one that should be fastest first."""
    widest = triton.next_power_of_2(group_size)
    return [Plan(max(size, widest), max(4, min(16, max(size, widest) // 512))) for size in (2048, 1024)]


def gate(facts: Facts) -> Verdict:
    """Admit a plan for the group size and dtype of a call on its device."""
    width = facts.size("group_size")
    x, z = torch.randn(2, 67, 2 * width, dtype=facts.dtype, device=facts.device)
    inputs = {"x": x, "weight": torch.rand(2 * width, device=facts.device), "gate": z}
    options = {"norm_before_gate": False, "group_size": width, "eps": 1e-5}

    def trial() -> str:
        return common.trial(rms_norm, torch_impl.rms_norm, inputs | options)

    arch = common.capability(torch.device(facts.device))
    return common.admit(_name(facts.dtype, arch, width), plans(width), trial)


def _name(dtype: torch.dtype, arch: int, group_size: int) -> str:
    return common.configuration("norm", dtype, arch, group_size)


def rms_norm(
    x: Tensor, weight: Tensor | None, *, gate: Tensor | None, norm_before_gate: bool, group_size: int | None, eps: float
) -> Tensor:
    x = x.contiguous()
    gate = None if gate is None else gate.contiguous()
    return _forward(x, weight, gate, norm_before_gate, group_size or x.shape[-1], float(eps))[0]


def forward(
    x: Tensor, weight: Tensor | None, gate: Tensor | None, norm_before_gate: bool, group_size: int, eps: float
) -> tuple[Tensor, Tensor]:
    """y and the inverse root mean square of every row and group."""
    y = torch.empty_like(x)
    groups = x.shape[-1] // group_size
    scales = torch.empty(*x.shape[:-1], groups, dtype=torch.float32, device=x.device)
    rows = x.numel() // x.shape[-1]
    tile = _tile(x, group_size, norm_before_gate)
    common.launch(
        kernels.outputs, (triton.cdiv(rows, tile["R"]), groups), x, weight, gate, y, scales, rows, eps, **tile
    )
    return y, scales


def gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    scales: Tensor,
    norm_before_gate: bool,
    group_size: int,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    width, rows = x.shape[-1], x.numel() // x.shape[-1]
    tile = _tile(x, group_size, norm_before_gate)
    tiles = triton.cdiv(triton.cdiv(rows, tile["R"]), STRIPS)
    strips = triton.cdiv(rows, tile["R"] * tiles)
    dx, dgate = torch.empty_like(x), None if gate is None else torch.empty_like(x)
    dweight = torch.empty(strips, width, dtype=torch.float32, device=x.device) if needs_weight else None
    common.launch(
        kernels.gradients,
        (strips, width // group_size),
        *(dy.contiguous(), x, weight, gate, scales, dx, dgate, dweight, rows, tiles),
        **tile,
    )
    return (
        dx,
        scales.new_empty(0) if dgate is None else dgate,
        scales.new_empty(0) if dweight is None else dweight.sum(0),
    )


def _tile(x: Tensor, group_size: int, norm_before_gate: bool) -> dict[str, Any]:
    plan = common.chosen(_name(x.dtype, common.capability(x.device), group_size), plans(group_size))
    covers = triton.next_power_of_2(group_size)
    return {
        "D": group_size,
        "GROUPS": x.shape[-1] // group_size,
        "R": plan.elements // covers,
        "B": covers,
        "LAST": norm_before_gate,
        "num_warps": plan.warps,
        "num_stages": 1,
    }


_forward = torch.library.custom_op("seqlib_triton::rms_norm", forward, mutates_args=())
_gradients = torch.library.custom_op("seqlib_triton::rms_norm_bwd", gradients, mutates_args=())


@_forward.register_fake
def _(
    x: Tensor, weight: Tensor | None, gate: Tensor | None, norm_before_gate: bool, group_size: int, eps: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], x.shape[-1] // group_size), dtype=torch.float32)


@_gradients.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    scales: Tensor,
    norm_before_gate: bool,
    group_size: int,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dgate = scales.new_empty(0) if gate is None else torch.empty_like(x)
    return torch.empty_like(x), dgate, scales.new_empty(x.shape[-1] if needs_weight else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, gate, ctx.norm_before_gate, ctx.group_size, _ = inputs
    ctx.save_for_backward(x, weight, gate, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    x, weight, gate, scales = ctx.saved_tensors
    needs_weight = weight is not None and ctx.needs_input_grad[1]
    dx, dgate, dweight = _gradients(dy, x, weight, gate, scales, ctx.norm_before_gate, ctx.group_size, needs_weight)
    return dx, dweight.to(weight.dtype) if needs_weight else None, None if gate is None else dgate, None, None, None


torch.library.register_autograd("seqlib_triton::rms_norm", _backward, setup_context=_save)
