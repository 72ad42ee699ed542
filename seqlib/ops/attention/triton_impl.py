"""Windowed attention by Triton kernels: keys out of a block's window are never read, in either pass."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from seqlib.dispatch import Facts, Verdict
from seqlib.ops import triton_common as common
from seqlib.ops.attention import triton_kernels as kernels
from seqlib.ops.attention.past import Tokens
from seqlib.ops.attention.state import KVState
from seqlib.ops.attention.torch_impl import Rule, attend, attention_parallel
from seqlib.ops.triton_call import contiguous_rows, sum_groups

__all__ = ["attention_windowed", "gate"]


class Plan(NamedTuple):
    """(queries of a block, keys of a block, num_warps, num_stages) of both passes."""

    forward: tuple[int, int, int, int]
    backward: tuple[int, int, int, int]


@functools.cache
def plans(dtype: torch.dtype, headdim: int, headdim_v: int) -> list[Plan]:
    """Candidates, the one that should be fastest first."""
    wide = max(headdim, headdim_v) > 64
    if dtype == torch.bfloat16:
        return [Plan((64, 64, 4, 2), (64, 64, 8 if wide else 4, 2)), Plan((64, 32, 4, 1), (32, 64, 8, 1))]
    return [
        Plan((32, 16 if wide else 32, 4, 1), (16, 16, 4, 1) if wide else (32, 32, 4, 1)),
        Plan((16, 16, 4, 1), (16, 16, 4, 1)),
    ]


def gate(facts: Facts) -> Verdict:
    """Admit a plan for the head sizes and dtype of a call on its device."""
    sizes = facts.size("headdim"), facts.size("headdim_v")
    q, k, v = (
        torch.randn(2, 333, heads, width, dtype=facts.dtype, device=facts.device)
        for heads, width in ((4, sizes[0]), (2, sizes[0]), (2, sizes[1]))
    )
    options = {"log_decay": None, "window": 100, "causal": True, "scale": sizes[0] ** -0.5, "relu": False}
    inputs = {"q": q, "k": k, "v": v, "state": None, "seq": None, **options}

    def trial() -> str:
        return common.trial(attention_windowed, attention_parallel, inputs)

    arch = common.capability(torch.device(facts.device))
    return common.admit(_name(facts.dtype, *sizes, arch), plans(facts.dtype, *sizes), trial)


def _name(dtype: torch.dtype, headdim: int, headdim_v: int, arch: int) -> str:
    return common.configuration("attention", dtype, arch, f"{headdim}x{headdim_v}")


def attention_windowed(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, **options) -> tuple[Tensor, KVState]:
    return attend(_windowed, q, k, v, log_decay, **options)


def _windowed(queries: Tokens, keys: Tokens, rule: Rule) -> Tensor:
    (q,), (k, v) = queries, keys
    window = k.shape[1] if rule.window is None else min(rule.window, k.shape[1])
    return _forward(q, k, v, rule.begin, rule.end, window, rule.causal, float(rule.scale))[0]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    begin: Tensor | None,
    end: Tensor | None,
    window: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """y, and log2 of every query's sum of exponentials."""
    q, k, v = (contiguous_rows(t) for t in (q, k, v))
    batch, seqlen, nheads, _ = q.shape
    y = torch.empty(batch, seqlen, nheads, v.shape[3], dtype=q.dtype, device=q.device)
    peaks = torch.empty(batch, seqlen, nheads, dtype=torch.float32, device=q.device)
    tiles = _tiles(q, v, "forward")
    common.launch(
        kernels.outputs,
        (batch * nheads * triton.cdiv(seqlen, tiles["BI"]),),
        *(q, k, v, begin, end, y, peaks, *common.leading(q, k, v)),
        *(*_sizes(q, k, window), scale * math.log2(math.e)),
        **tiles,
        CAUSAL=causal,
    )
    return y, peaks


def gradients(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    begin: Tensor | None,
    end: Tensor | None,
    y: Tensor,
    peaks: Tensor,
    window: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, dy = (contiguous_rows(t) for t in (q, k, v, dy))
    batch, seqlen, nheads, _ = q.shape
    deltas = (y.float() * dy.float()).sum(-1)
    wide = q.dtype if k.shape[2] == nheads else torch.float32
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.empty(batch, k.shape[1], nheads, t.shape[3], dtype=wide, device=q.device) for t in (k, v))
    tiles = _tiles(q, v, "backward")
    given = (q, k, v, dy, begin, end, peaks, deltas)
    sizes = (*common.leading(q, k, v, dy), *_sizes(q, k, window), scale * math.log2(math.e), scale)
    blocks = triton.cdiv(seqlen, tiles["BI"]), triton.cdiv(k.shape[1], tiles["BJ"])
    common.launch(kernels.grad_q, (batch * nheads * blocks[0],), *given, dq, *sizes, **tiles, CAUSAL=causal)
    common.launch(kernels.grad_kv, (batch * nheads * blocks[1],), *given, dk, dv, *sizes, **tiles, CAUSAL=causal)
    return dq, sum_groups(dk, k), sum_groups(dv, v)


def _sizes(q: Tensor, k: Tensor, window: int) -> tuple[int, ...]:
    return q.shape[1], k.shape[1] - q.shape[1], window, q.shape[2], q.shape[2] // k.shape[2]


def _tiles(q: Tensor, v: Tensor, direction: str) -> dict[str, Any]:
    about = q.dtype, q.shape[3], v.shape[3]
    plan = common.chosen(_name(*about, common.capability(q.device)), plans(*about))
    queries, keys, warps, stages = getattr(plan, direction)
    products = common.products(q.dtype)
    return {
        "N": q.shape[3],
        "P": v.shape[3],
        "BN": common.tile(q.shape[3], 256),
        "BP": common.tile(v.shape[3], 256),
        "BI": queries,
        "BJ": keys,
        "DOT": products.dot,
        "PRECISION": products.precision,
        "num_warps": warps,
        "num_stages": stages,
    }


_forward = torch.library.custom_op("seqlib_triton::attention", forward, mutates_args=())
_gradients = torch.library.custom_op("seqlib_triton::attention_bwd", gradients, mutates_args=())


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    begin: Tensor | None,
    end: Tensor | None,
    window: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


@_gradients.register_fake
def _(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    begin: Tensor | None,
    end: Tensor | None,
    y: Tensor,
    peaks: Tensor,
    window: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.window, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 8
    return *_gradients(dy, *ctx.saved_tensors, ctx.window, ctx.causal, ctx.scale), *(None,) * 5


torch.library.register_autograd("seqlib_triton::attention", _backward, setup_context=_save)
