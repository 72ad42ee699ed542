"""PaTH attention with the part that grows with the square of the sequence in Triton kernels.

What stays within a block is torch's, but for the inverse of its triangle, and made again for the backward pass. That
pass keeps the queries as they come to every block of keys, for as many blocks of queries at a time as memory is given.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor

from seqlib.dispatch import Facts, Verdict
from seqlib.ops import triton_common as common
from seqlib.ops.delta_rule.triton_kernels import inverses
from seqlib.ops.derivatives import recomputed
from seqlib.ops.path_attention import triton_kernels as kernels
from seqlib.ops.path_attention.state import PathState
from seqlib.ops.path_attention.torch_impl import (
    Blocks,
    Past,
    attend,
    block_maps,
    by_block,
    by_token,
    in_blocks,
    path_attention_chunked,
)

__all__ = ["gate", "path_attention"]

CARRIED_BYTES = 1 << 30  # queries that are kept beside blocks of keys at one time, and their gradients as much again

Tiles = tuple[int, int]


class Plan(NamedTuple):
    """Tokens of a block, and (num_warps, num_stages) of the kernels: those that walk forward, and the backward ones."""

    chunk: int
    walk: Tiles
    queries: Tiles
    keys: Tiles
    maps: Tiles


@functools.cache
def plans(dtype: torch.dtype, headdim: int, headdim_v: int, capability: int) -> list[Plan]:
    """Candidates, the one that should be fastest first."""
    careful = Plan(16, *[(4, 1)] * 4)
    if dtype != torch.bfloat16:
        return [careful]
    large = Plan(64, (4, 2), (4, 2), (8, 1), (8, 1))
    fits = capability >= 90 and max(headdim, headdim_v) <= 64
    return [*([large] if fits else []), Plan(32, *[(4, 1)] * 4), careful]


def gate(facts: Facts) -> Verdict:
    """Admit a plan for the head sizes and dtype of a call on its device."""
    about = facts.dtype, facts.size("headdim"), facts.size("headdim_v")
    wide: dict[str, Any] = {"dtype": torch.float32, "device": facts.device}
    q, k, v = (
        torch.randn(2, 263, heads, width, dtype=facts.dtype, device=facts.device)
        for heads, width in ((4, about[1]), (2, about[1]), (2, about[2]))
    )
    inputs = {
        "q": q,
        "k": k,
        "v": v,
        "w": F.normalize(torch.randn(k.shape, **wide), dim=-1),
        "beta": 2 * torch.rand(k.shape[:3], **wide),
        "log_decay": F.logsigmoid(2 + torch.randn(q.shape[:3], **wide)),
    }
    options = {"scale": about[1] ** -0.5, "chunk_size": None, "state": None, "seq": None}

    def trial() -> str:
        fault = common.trial(path_attention, path_attention_chunked, inputs | options)
        return fault or common.trial(path_attention, path_attention_chunked, inputs | options | {"log_decay": None})

    arch = common.capability(torch.device(facts.device))
    return common.admit(_name(*about, arch), plans(*about, arch), trial)


def _name(dtype: torch.dtype, headdim: int, headdim_v: int, arch: int) -> str:
    return common.configuration("path_attention", dtype, arch, f"{headdim}x{headdim_v}")


def path_attention(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, beta: Tensor, log_decay: Tensor | None, **options: Any
) -> tuple[Tensor, PathState]:
    return attend(_attend, q, k, v, w, beta, log_decay, **options)


def _attend(
    inputs: tuple[Tensor, ...], past: Past | None, scale: float, _: int | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    q, k, v, w, beta, *sums = inputs
    seqlen, group = q.shape[1], q.shape[2] // k.shape[2]
    chunk = _chunk(v.dtype, k.shape[3], v.shape[3], v.device)
    stored = common.products(v.dtype).stored
    made = Blocks(*recomputed(in_blocks, q, k, v, w, beta, chunk, _inverse))
    keys, values = made.k.to(stored), made.v.to(v.dtype)
    front = 0
    if past is not None:
        held = [F.pad(t, (0, 0, 0, -t.shape[2] % chunk)).unflatten(2, (-1, chunk)) for t in (past.k, past.v)]
        keys, values = (torch.cat([t.to(u.dtype), u], 2) for t, u in zip(held, (keys, values)))
        front = held[0].shape[2]
    maps = (F.pad(t, (0, 0, 0, 0, front, 0)) for t in (made.w, made.tw))
    G = None
    if past is not None or sums:
        G = by_block(_sums(sums[0] if sums else q.new_zeros(q.shape[:3], dtype=torch.float64), past, chunk), chunk)
        G = G.unflatten(1, (-1, group)).transpose(2, 3).contiguous()
    given = (t.contiguous() for t in (made.q.to(stored), keys, values, *maps, made.local))
    y, _ = _forward(*given, G, float(scale))
    brought, held_keys = recomputed(_to_the_end, made.k, made.w, made.tw, None if past is None else past.k)
    return by_token(y, group, seqlen), brought[:, :seqlen], held_keys


def _sums(sums: Tensor, past: Past | None, chunk: int) -> Tensor:
    """Log-decays up to each token, (b, seqlen, h), with whole blocks of the past in front. Its free slots are so far
    above that nothing reaches them."""
    if past is None:
        return sums
    nothing, room = 1e30, -past.live.shape[1] % chunk
    before = sums.new_zeros(()) if past.decay is None else -past.decay.to(sums.dtype).transpose(1, 2)
    before = torch.where(past.live.unsqueeze(-1), before, nothing).expand(-1, -1, sums.shape[2])
    return torch.cat([F.pad(before, (0, 0, 0, room), value=nothing), sums], 1)


def _to_the_end(K: Tensor, W: Tensor, TW: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Keys of all blocks and of the past come through the maps of all blocks after them, (b, seqlen, g, n)."""
    ways, reach = block_maps(W, TW), 1
    while reach < ways.shape[2]:  # twice as many maps in each product
        ways = torch.cat([ways[:, :, reach:] @ ways[:, :, :-reach], ways[:, :, -reach:]], 2)
        reach *= 2
    keys = torch.cat([K[:, :, :-1] @ ways[:, :, 1:].transpose(-1, -2), K[:, :, -1:]], 2)
    held = None if past is None else (past.to(ways.dtype) @ ways[:, :, 0].transpose(-1, -2)).transpose(1, 2)
    return keys.flatten(2, 3).transpose(1, 2), held


def inverse(w: Tensor, beta: Tensor) -> Tensor:
    """(I + tril(diag(beta) W W^T, -1))^-1 of every block: w (b, g, c, q, n) and beta (b, g, c, q)."""
    w, beta = w.contiguous(), beta.contiguous()
    *blocks, chunk, width = w.shape
    count = math.prod(blocks)
    out = torch.empty(*blocks, chunk, chunk, dtype=torch.float32, device=w.device)
    # Every block is a sequence of its own, with one head.
    common.launch(
        inverses,
        (count,),
        *(w, beta, None, None, None, out, chunk * width, width, width, chunk, 1, 1, 0, 0, 0, 0, chunk, 1, 1),
        **{"N": width, "P": 16, "BN": common.tile(width, 32), "BP": 16, "C": chunk, "KIND": "none", "PACKED": False},
        **{"DOT": tl.float32, "PRECISION": "tf32x3", "FINE": tl.float32, "FINE_PRECISION": "tf32x3"},
        num_warps=4,
        num_stages=1,
    )
    return out


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    tw: Tensor,
    local: Tensor,
    sums: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """y and log2 of every query's sum of exponentials, from the tensors of `Blocks` with the past in front of k, v, w
    and tw, and sums (b, g, c, r, q) of the same blocks."""
    y = torch.empty(*q.shape[:4], v.shape[4], dtype=v.dtype, device=q.device)
    peaks = torch.empty(q.shape[:4], dtype=torch.float32, device=q.device)
    rows, blocks, past, group = _sizes(q, k)
    common.launch(
        kernels.outputs,
        (rows * blocks * group,),
        *(q, k, v, w, tw, local, sums, y, peaks, blocks, past, group, scale * math.log2(math.e)),
        **_constants(k, v, "walk"),
    )
    return y, peaks


def gradients(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    tw: Tensor,
    local: Tensor,
    sums: Tensor | None,
    y: Tensor,
    peaks: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dy, deltas = dy.contiguous(), (y.float() * dy.float()).sum(-1)
    rows, blocks, past, group = _sizes(q, k)
    dq, dlocal = torch.empty_like(q), torch.empty_like(local)
    dk, dv, dw, dtw = (torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (k, v, w, tw))
    dsums = None if sums is None else torch.zeros_like(sums)
    scales = scale * math.log2(math.e), scale
    walk = {name: c for name, c in _constants(k, v, "walk").items() if name not in ("P", "BP", "DOT", "PRECISION")}
    maps = walk | dict(zip(("num_warps", "num_stages"), _plan(k, v).maps))
    keys = {name: c for name, c in _constants(k, v, "keys").items() if name != "FINE_PRECISION"}
    for first, count in _parts(q, k):
        width = past + first + count
        part = (first, count, width, blocks, past, group)
        x, g = (torch.empty(rows * count * group, width, *k.shape[3:], dtype=k.dtype, device=k.device) for _ in "xg")
        common.launch(kernels.carry, (rows * count * group,), q, w, tw, x, *part, **walk)
        common.launch(
            kernels.grad_queries,
            (rows * count * group,),
            *(k, v, w, tw, local, sums, x, dy, peaks, deltas, dq, dlocal, g, *part, *scales),
            **_constants(k, v, "queries"),
        )
        common.launch(
            kernels.grad_keys,
            (rows * width,),
            *(k, v, local, sums, x, dy, peaks, deltas, dk, dv, dsums, *part, *scales),
            **keys,
        )
        common.launch(kernels.grad_maps, (rows * width,), w, tw, x, g, dw, dtw, *part, **maps)
    return dq, dk.to(k.dtype), dv.to(v.dtype), dw, dtw, dlocal, peaks.new_empty(0) if dsums is None else dsums


def _sizes(q: Tensor, k: Tensor) -> tuple[int, int, int, int]:
    """Batch and key heads, blocks of queries, blocks of the past, and query heads of a key head."""
    return q.shape[0] * q.shape[1], q.shape[2], k.shape[2] - q.shape[2], q.shape[3] // k.shape[3]


def _parts(q: Tensor, k: Tensor) -> Iterator[tuple[int, int]]:
    """(first, count) of blocks of queries that are worked on at a time."""
    _, blocks, _, group = _sizes(q, k)
    count = max(1, CARRIED_BYTES // (group * k.numel() * k.element_size()))
    for first in range(0, blocks, count):
        yield first, min(count, blocks - first)


def _plan(k: Tensor, v: Tensor) -> Plan:
    return _chosen(v.dtype, k.shape[-1], v.shape[-1], v.device)


def _chosen(dtype: torch.dtype, headdim: int, headdim_v: int, device: torch.device) -> Plan:
    about = dtype, headdim, headdim_v, common.capability(device)
    return common.chosen(_name(*about), plans(*about))


@torch.compiler.assume_constant_result  # plans are named by an assembler, which cannot be asked while tracing
def _chunk(*about: Any) -> int:
    return _chosen(*about).chunk


def _constants(k: Tensor, v: Tensor, kernel: str) -> dict[str, Any]:
    warps, stages = getattr(_plan(k, v), kernel)
    products = common.products(v.dtype)
    return {
        "N": k.shape[4],
        "P": v.shape[4],
        "BN": common.tile(k.shape[4], 256),
        "BP": common.tile(v.shape[4], 256),
        "C": k.shape[3],
        "DOT": products.dot,
        "PRECISION": products.precision,
        "FINE_PRECISION": products.fine_precision,
        "num_warps": warps,
        "num_stages": stages,
    }


_inverse = torch.library.custom_op("seqlib_triton::path_inverse", inverse, mutates_args=())
_forward = torch.library.custom_op("seqlib_triton::path_attention", forward, mutates_args=())
_gradients = torch.library.custom_op("seqlib_triton::path_attention_bwd", gradients, mutates_args=())


@_inverse.register_fake
def _(w: Tensor, beta: Tensor) -> Tensor:
    return w.new_empty(*beta.shape, beta.shape[-1])


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    tw: Tensor,
    local: Tensor,
    sums: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return v.new_empty(*q.shape[:4], v.shape[4]), q.new_empty(q.shape[:4], dtype=torch.float32)


@_gradients.register_fake
def _(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    tw: Tensor,
    local: Tensor,
    sums: Tensor | None,
    y: Tensor,
    peaks: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dsums = peaks.new_empty(0) if sums is None else torch.empty_like(sums)
    dq, dk, dv, dw, dtw, dlocal = (torch.empty_like(t) for t in (q, k, v, w, tw, local))
    return dq, dk, dv, dw, dtw, dlocal, dsums


def _save_inverse(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs, output)


def _inverse_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    w, beta, made = ctx.saved_tensors
    turned = made.transpose(-1, -2)
    dproducts = -(turned @ grad @ turned).tril(-1)
    dscores = beta.unsqueeze(-1) * dproducts
    return (dscores + dscores.transpose(-1, -2)) @ w, (dproducts * (w @ w.transpose(-1, -2))).sum(-1)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 8
    *made, dsums = _gradients(dy, *ctx.saved_tensors, ctx.scale)
    return *made, dsums if ctx.saved_tensors[6] is not None else None, None


torch.library.register_autograd("seqlib_triton::path_inverse", _inverse_backward, setup_context=_save_inverse)
torch.library.register_autograd("seqlib_triton::path_attention", _backward, setup_context=_save)
