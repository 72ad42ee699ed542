"""The delta rule by Triton kernels: the triangular systems of all chunks at once, then the state chunk by chunk.

The backward pass finds states and corrections again from the states that blocks started from.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from seqlib.dispatch import Facts, Verdict
from seqlib.ops import triton_common as common
from seqlib.ops.delta_rule import triton_kernels as kernels
from seqlib.ops.delta_rule.cases import case
from seqlib.ops.delta_rule.torch_impl import chunked
from seqlib.ops.documents import zero_padding
from seqlib.ops.linear_attention.summary import mask_padding
from seqlib.ops.linear_attention.triton_kernels import mix
from seqlib.ops.triton_call import Call, contiguous_rows, cut, float_state, like_decay, sum_groups
from seqlib.sequence import SequenceInfo

__all__ = ["delta_rule", "gate"]

Tiles = tuple[int, int, int, int]


class Plan(NamedTuple):
    """Tokens of a chunk, and (d_state tile, headdim tile, num_warps, num_stages) of each kernel."""

    chunk: int
    inverses: Tiles
    corrections: Tiles
    adjoints: Tiles
    gradients: Tiles
    mix: Tiles


@functools.cache
def plans(kind: str, dtype: torch.dtype, d_state: int, headdim: int, capability: int) -> list[Plan]:
    """Candidates, the one that should be fastest first."""
    half, tile = dtype == torch.bfloat16, common.tile
    chunk = 16 if kind == "channel" or not half else 64 if capability >= 90 else 32
    whole, narrow = tile(d_state, 256), 64 if half else 32
    side = tile(headdim, 32 if whole <= (128 if half else 64) else 16)
    serial = [(whole, side, 8 if whole > 64 else 4, stages if whole <= 128 else 1) for stages in (2, 1)]
    careful = [
        Plan(
            chunk,
            (tile(d_state, narrow), 16, 4, stages),
            walk,
            walk,
            (tile(d_state, 32), tile(headdim, 32), 8 if chunk == 64 else 4, stages),
            (tile(d_state, narrow), tile(headdim, narrow), 4, stages),
        )
        for walk, stages in zip(serial, (2, 1))
    ]
    if chunk < 64 or whole > 128:
        return careful
    measured = Plan(
        chunk,
        inverses=(tile(d_state, 64), 16, 4, 2),
        corrections=(whole, tile(headdim, 32), 4, 2),
        adjoints=(whole, tile(headdim, 64), 8, 2),
        gradients=(whole, tile(headdim, 32), 8, 1),
        mix=(tile(d_state, 64), tile(headdim, 128), 8, 2),
    )
    return [measured, *careful]


def gate(facts: Facts) -> Verdict:
    """Admit a plan for the decay, sizes and dtype of a call on its device."""
    kind = next((f.rsplit(maxsplit=1)[-1] for f in facts.features if f.startswith("decay")), "none")
    arch = common.capability(torch.device(facts.device))
    sizes = facts.size("d_state"), facts.size("headdim")

    def trial() -> str:
        inputs = case("gate", 2, 263, 2, *sizes, kind, state=True).inputs(facts.dtype, facts.device)
        options = {"log_decay": None, "scale": 0.5, "chunk_size": None, "seq": None}
        return common.trial(delta_rule, chunked, options | inputs)

    return common.admit(_name(kind, facts.dtype, *sizes, arch), plans(kind, facts.dtype, *sizes, arch), trial)


def _name(kind: str, dtype: torch.dtype, d_state: int, headdim: int, arch: int) -> str:
    return common.configuration("delta_rule", dtype, arch, kind, f"{d_state}x{headdim}")


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float,
    initial_state: Tensor | None,
    chunk_size: int | None,
    seq: SequenceInfo | None,
) -> tuple[Tensor, Tensor]:
    k, v, log_decay = mask_padding(k, v, log_decay, seq)
    if seq is not None and seq.padding_mask is not None:
        beta = beta.masked_fill(~seq.padding_mask.unsqueeze(-1), 0.0)
    q = zero_padding(q, seq)  # NaN times a gradient of zero is NaN
    y, state, _ = _forward(
        q, k, v, beta, log_decay, initial_state, None if seq is None else seq.document_ids, float(scale)
    )
    return zero_padding(y, seq), state


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    ids: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and the states that blocks start from."""
    call = _Call(q, k, v, (log_decay, beta), ids, scale)
    state = float_state(initial_state)
    y, kept = torch.empty(v.shape, dtype=v.dtype, device=v.device), []
    for begin, end in call.blocks():
        if state is not None:
            kept.append(state)
        part = call.part(begin, end)
        _, u, entries, state = part.correct(state)
        part.mix(part.q, part.k, u, entries, y[:, begin:end])
    assert state is not None
    return y, state, torch.stack(kept) if kept else state.new_empty(0)


def gradients(
    dy: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    ids: Tensor | None,
    checkpoints: Tensor,
    scale: float,
    needs_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    call = _Call(q, k, v, (log_decay, beta), ids, scale)
    spans = list(call.blocks())
    kept = list(checkpoints) if checkpoints.numel() else []
    starts = [*[None] * (len(spans) - len(kept)), *kept]  # without an initial state the first block has none
    tiles = triton.cdiv(call.d_state, call.plan.gradients[0])
    dq, dk, dv = call.gradient_of(call.q), call.gradient_of(call.k), call.tokens(call.headdim, v.dtype)
    dbeta = call.tokens(tiles)
    dg = call.tokens(call.d_state if call.kind == "channel" else tiles) if needs_decay else None
    dstate, dy = float_state(dfinal), contiguous_rows(dy)
    for (begin, end), start in zip(reversed(spans), reversed(starts)):
        part = call.part(begin, end)
        made = (cut(t, begin, end) for t in (dq, dk, dv, dbeta, dg))
        dstate = part.backward(dy[:, begin:end], start, dstate, *made)
    assert dstate is not None
    gates = dbeta.sum(-1).to(beta.dtype), like_decay(dg, log_decay, dstate)
    return sum_groups(dq, q), sum_groups(dk, k), dv, *gates, dstate


_forward = torch.library.custom_op("seqlib_triton::delta_rule", forward, mutates_args=())
_gradients = torch.library.custom_op("seqlib_triton::delta_rule_bwd", gradients, mutates_args=())


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    ids: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    call = _Call(q, k, v, (log_decay, beta), ids, scale)
    state = v.new_empty(v.shape[0], v.shape[2], k.shape[3], v.shape[3], dtype=torch.float32)
    count = -(-v.shape[1] // call.block()) - (initial_state is None)
    return torch.empty(v.shape, dtype=v.dtype, device=v.device), state, state.new_empty(count, *state.shape)


@_gradients.register_fake
def _(
    dy: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    ids: Tensor | None,
    checkpoints: Tensor,
    scale: float,
    needs_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    dg = v.new_empty(0) if not needs_decay or log_decay is None else torch.empty_like(log_decay)
    dstate = v.new_empty(v.shape[0], v.shape[2], k.shape[3], v.shape[3], dtype=torch.float32)
    return dq, dk, dv, torch.empty_like(beta), dg, dstate


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, beta, log_decay, initial_state, ids, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, beta, log_decay, ids, output[2])
    ctx.state_dtype = None if initial_state is None else initial_state.dtype
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    *tensors, checkpoints = ctx.saved_tensors
    dy = torch.zeros_like(tensors[2]) if dy is None else dy
    needs_decay = ctx.needs_input_grad[4]
    dq, dk, dv, dbeta, dg, dinitial = _gradients(dy, dfinal, *tensors, checkpoints, ctx.scale, needs_decay)
    state = None if ctx.state_dtype is None else dinitial.to(ctx.state_dtype)
    return dq, dk, dv, dbeta, dg if needs_decay else None, state, None, None


torch.library.register_autograd("seqlib_triton::delta_rule", _backward, setup_context=_save)


class _Call(Call):
    """Launches of the delta rule."""

    plan: Plan

    def find_plan(self, about: tuple[Any, ...]) -> None:
        self.plan = common.chosen(_name(*about), plans(*about))

    def correct(self, carry: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The inverse and the corrections of every chunk, the state that enters each, and the last state."""
        k, v, beta, heads = self.k, self.v, self.gates[1], self.batch * self.nheads
        inverse = torch.empty(heads, self.nchunks, self.plan.chunk, self.plan.chunk, device=v.device)
        common.launch(
            kernels.inverses,
            (heads * self.nchunks,),
            *(k, beta, self.g, self.ids, self.before, inverse),
            *(*common.leading(k, beta), *self.gate_strides(), self.seqlen, self.nheads, self.shared(k)),
            **self.constants(*self.plan.inverses),
        )
        u = self.tokens(self.headdim, self.products.stored)
        entries, final = self.states(self.products.stored, self.nchunks), self.states()
        common.launch(
            kernels.corrections,
            (heads, triton.cdiv(self.headdim, self.plan.corrections[1])),
            *(k, v, beta, self.g, self.ids, self.before, inverse, carry, entries, u, final),
            *(*common.leading(k, v, beta), *self.gate_strides(), self.seqlen, self.nheads, self.shared(k)),
            **self.constants(*self.plan.corrections),
        )
        return inverse, u, entries, final

    def mix(self, x: Tensor, z: Tensor, u: Tensor, states: Tensor | None, out: Tensor, *, turned: bool = False) -> None:
        """Linear attention, with the corrections for values."""
        common.launch(
            mix,
            (self.batch * self.nheads * self.nchunks, triton.cdiv(self.headdim, self.plan.mix[1])),
            *(x, z, u, self.g, self.ids, self.before, states, out),
            *(*common.leading(x, z, u), *self.gate_strides(), out.stride(0) // out.stride(1), self.seqlen),
            *(self.nheads, self.shared(x), self.shared(z), self.scale),
            **self.constants(*self.plan.mix),
            TURNED=turned,
        )

    def backward(
        self,
        dy: Tensor,
        start: Tensor | None,
        dstate: Tensor | None,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        dbeta: Tensor,
        dg: Tensor | None,
    ) -> Tensor:
        """Write the gradients and return that of the state before the first token."""
        q, k, v, beta, heads = self.q, self.k, self.v, self.gates[1], self.batch * self.nheads
        inverse, u, entries, _ = self.correct(start)
        x = self.tokens(self.headdim, self.products.stored)
        self.mix(k, q, dy, None, x, turned=True)
        exits, dinitial = self.states(self.products.stored, self.nchunks), self.states()
        rows = dv.stride(0) // dv.stride(1)
        sizes = (rows, self.seqlen, self.nheads, self.shared(q), self.shared(k), self.scale)
        common.launch(
            kernels.adjoints,
            (heads, triton.cdiv(self.headdim, self.plan.adjoints[1])),
            *(q, k, dy, beta, self.g, self.ids, self.before, inverse, dstate, exits, x, dv, dinitial),
            *(*common.leading(q, k, dy, beta), *self.gate_strides(), *sizes),
            **self.constants(*self.plan.adjoints),
        )
        common.launch(
            kernels.gradients,
            (heads * self.nchunks, triton.cdiv(self.d_state, self.plan.gradients[0])),
            *(q, k, v, dy, beta, self.g, self.ids, self.before, u, x, entries, exits, dq, dk, dbeta, dg),
            *(*common.leading(q, k, v, dy, beta), *self.gate_strides(), *sizes),
            **self.constants(*self.plan.gradients),
        )
        return dinitial
