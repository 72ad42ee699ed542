"""Linear attention by Triton kernels.

Forward: one program per head, tile of headdim and span of chunks carries the state in registers; states are not written
to memory. Backward: states and their gradients are written for each chunk, then all chunks at once give the gradients.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from seqlib.dispatch import Facts, Verdict
from seqlib.ops import triton_common as common
from seqlib.ops.documents import zero_padding
from seqlib.ops.linear_attention import triton_kernels as kernels
from seqlib.ops.linear_attention.bidirectional import bidirectional
from seqlib.ops.linear_attention.cases import case
from seqlib.ops.linear_attention.summary import mask_padding
from seqlib.ops.linear_attention.torch_impl import chunked
from seqlib.ops.triton_call import Call, contiguous_rows, cut, float_state, like_decay, sum_groups
from seqlib.sequence import SequenceInfo

__all__ = ["gate", "linear_attention"]

PROGRAMS = 264  # enough to fill the device: two for each of the 132 processors of an H100
MOST_SPANS = 32


class Plan(NamedTuple):
    """Tokens of a chunk, and (d_state tile, headdim tile, num_warps, num_stages) of each kernel. Without `outputs`, y
    comes from states in memory as the gradients do."""

    chunk: int
    outputs: tuple[int, int, int, int] | None
    states: tuple[int, int, int, int]
    grad_qk: tuple[int, int, int, int]
    mix: tuple[int, int, int, int]


@functools.cache
def plans(kind: str, dtype: torch.dtype, d_state: int, headdim: int, capability: int) -> list[Plan]:
    """Candidates, the one that should be fastest first. Registers decide: those of machines before Hopper and products
    in float32 want smaller tiles."""
    half, hopper, tile = dtype == torch.bfloat16, capability >= 90, common.tile
    chunk = 64 if half and kind != "channel" else 16
    whole, side = tile(d_state, 256), tile(headdim, 64 if hopper else 32)
    states = (tile(d_state, 64), tile(headdim, 64), 4, 2)
    mix = (tile(d_state, 64 if half else 32), tile(headdim, 64 if half else 32), 4, 2)
    grad_qk = (tile(d_state, 32), tile(headdim, 64), 8, 2)
    if not (half and hopper):
        grad_qk = (tile(d_state, 32), tile(headdim, 32), 8 if half else 4, 2)
    by_memory = Plan(chunk, None, states, grad_qk, mix)
    if not half or whole > 128:
        return [by_memory]
    in_registers = by_memory._replace(outputs=(whole, side, 8 if whole > 64 else 4, 2))
    if not hopper or kind == "channel":
        return [in_registers, by_memory]
    measured = Plan(
        chunk,
        outputs=(whole, side, 4, 2),
        states=(tile(d_state, 32), 128, 4, 3) if headdim > 64 else (tile(d_state, 64), side, 4, 3),
        grad_qk=(tile(d_state, 64), side, 4, 2),
        mix=(tile(d_state, 64), tile(headdim, 128), 4, 2),
    )
    return [measured, in_registers, by_memory]


def gate(facts: Facts) -> Verdict:
    """Admit a plan for the decay, sizes and dtype of a call on its device."""
    kind = next((f.rsplit(maxsplit=1)[-1] for f in facts.features if f.startswith("decay")), "none")
    arch = common.capability(torch.device(facts.device))
    sizes = facts.size("d_state"), facts.size("headdim")

    def trial() -> str:
        inputs = case("gate", 2, 263, 2, *sizes, kind, state=True).inputs(facts.dtype, facts.device)
        options = {"log_decay": None, "scale": 0.5, "causal": True, "chunk_size": None, "seq": None}
        return common.trial(linear_attention, chunked, options | inputs)

    return common.admit(_name(kind, facts.dtype, *sizes, arch), plans(kind, facts.dtype, *sizes, arch), trial)


def _name(kind: str, dtype: torch.dtype, d_state: int, headdim: int, arch: int) -> str:
    return common.configuration("linear_attention", dtype, arch, kind, f"{d_state}x{headdim}")


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float,
    initial_state: Tensor | None,
    causal: bool,
    chunk_size: int | None,
    seq: SequenceInfo | None,
) -> tuple[Tensor, Tensor]:
    def run(
        q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, seq: SequenceInfo | None
    ) -> tuple[Tensor, Tensor]:
        k, v, log_decay = mask_padding(k, v, log_decay, seq)
        q = zero_padding(q, seq)  # NaN times a gradient of zero is NaN
        return _forward(q, k, v, log_decay, initial_state, None if seq is None else seq.document_ids, float(scale))[:2]

    if not causal:
        return bidirectional(run, q, k, v, log_decay, scale, seq)
    y, state = run(q, k, v, log_decay, seq)
    return zero_padding(y, seq), state


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    ids: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and the states that blocks start from."""
    call = _Call(q, k, v, (log_decay,), ids, scale)
    state = float_state(initial_state)
    y, entries = torch.empty(v.shape, dtype=v.dtype, device=v.device), []
    for begin, end in call.blocks():
        part = call.part(begin, end)
        if state is not None:
            entries.append(state)
        state = part.forward(y[:, begin:end], state)
    assert state is not None
    return y, state, torch.stack(entries) if entries else state.new_empty(0)


def gradients(
    dy: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    ids: Tensor | None,
    checkpoints: Tensor,
    scale: float,
    needs_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    call = _Call(q, k, v, (log_decay,), ids, scale)
    spans = list(call.blocks())
    kept = list(checkpoints) if checkpoints.numel() else []
    entries = [*[None] * (len(spans) - len(kept)), *kept]  # without an initial state the first block has none
    dq, dk, dv = call.gradient_of(call.q), call.gradient_of(call.k), call.tokens(call.headdim, v.dtype)
    tiles = call.d_state if call.kind == "channel" else triton.cdiv(call.d_state, call.plan.grad_qk[0])
    dg = call.tokens(tiles) if needs_decay else None
    dstate, dy = float_state(dfinal), contiguous_rows(dy)
    for (begin, end), entry in zip(reversed(spans), reversed(entries)):
        part = call.part(begin, end)
        dstate = part.backward(dy[:, begin:end], entry, dstate, *(cut(t, begin, end) for t in (dq, dk, dv, dg)))
    assert dstate is not None
    return sum_groups(dq, q), sum_groups(dk, k), dv, like_decay(dg, log_decay, dstate), dstate


_forward = torch.library.custom_op("seqlib_triton::linear_attention", forward, mutates_args=())
_gradients = torch.library.custom_op("seqlib_triton::linear_attention_bwd", gradients, mutates_args=())


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    ids: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    call = _Call(q, k, v, (log_decay,), ids, scale)
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
    log_decay: Tensor | None,
    ids: Tensor | None,
    checkpoints: Tensor,
    scale: float,
    needs_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shapes = [q.shape, k.shape, v.shape]
    dq, dk, dv = (torch.empty(shape, dtype=v.dtype, device=v.device) for shape in shapes)
    dg = v.new_empty(0) if not needs_decay or log_decay is None else torch.empty_like(log_decay)
    return dq, dk, dv, dg, v.new_empty(v.shape[0], v.shape[2], k.shape[3], v.shape[3], dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, log_decay, initial_state, ids, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, log_decay, ids, output[2])
    ctx.state_dtype = None if initial_state is None else initial_state.dtype
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    *tensors, checkpoints = ctx.saved_tensors
    dy = torch.zeros_like(tensors[2]) if dy is None else dy
    needs_decay = ctx.needs_input_grad[3]
    dq, dk, dv, dg, dinitial = _gradients(dy, dfinal, *tensors, checkpoints, ctx.scale, needs_decay)
    state = None if ctx.state_dtype is None else dinitial.to(ctx.state_dtype)
    return dq, dk, dv, dg if needs_decay else None, state, None, None


torch.library.register_autograd("seqlib_triton::linear_attention", _backward, setup_context=_save)


class _Call(Call):
    """Launches of linear attention."""

    plan: Plan

    def find_plan(self, about: tuple[Any, ...]) -> None:
        self.plan = common.chosen(_name(*about), plans(*about))

    def forward(self, y: Tensor, carry: Tensor | None) -> Tensor:
        """Write y and return the state after the last token."""
        if self.plan.outputs is None:
            entries, final = self._walk(self.k, self.v, carry, reverse=False)
            self._mix(self.q, self.k, self.v, entries, y, turned=False)
            return final
        tiles = triton.cdiv(self.headdim, self.plan.outputs[1])
        per_span, nspans = self._spans(tiles)
        summary = self._summary(self.k, self.v, per_span, nspans, reverse=False)
        final = self.states()
        common.launch(
            kernels.outputs,
            (self.batch * self.nheads * nspans, tiles),
            *(self.q, self.k, self.v, self.g, self.ids, self.before, carry, *summary, y, final),
            *(*common.leading(self.q, self.k, self.v), *self.gate_strides()),
            *(
                y.stride(0) // y.stride(1),
                self.seqlen,
                self.nheads,
                self.shared(self.q),
                self.shared(self.k),
                per_span,
                nspans,
                self.scale,
            ),
            **self.constants(*self.plan.outputs),
        )
        return final

    def backward(
        self,
        dy: Tensor,
        entry: Tensor | None,
        dstate: Tensor | None,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        dg: Tensor | None,
    ) -> Tensor:
        """Write the gradients and return that of the state before the first token."""
        entries, _ = self._walk(self.k, self.v, entry, reverse=False)
        exits, dinitial = self._walk(self.q, dy, dstate, reverse=True)
        common.launch(
            kernels.grad_qk,
            (self.batch * self.nheads * self.nchunks, triton.cdiv(self.d_state, self.plan.grad_qk[0])),
            *(self.q, self.k, self.v, dy, self.g, self.ids, self.before, entries, exits, dq, dk, dg),
            *(*common.leading(self.q, self.k, self.v, dy), *self.gate_strides()),
            *(
                dv.stride(0) // dv.stride(1),
                self.seqlen,
                self.nheads,
                self.shared(self.q),
                self.shared(self.k),
                self.scale,
            ),
            **self.constants(*self.plan.grad_qk),
        )
        self._mix(self.k, self.q, dy, exits, dv, turned=True)
        return dinitial

    def _mix(self, x: Tensor, z: Tensor, u: Tensor, states: Tensor, out: Tensor, *, turned: bool) -> None:
        common.launch(
            kernels.mix,
            (self.batch * self.nheads * self.nchunks, triton.cdiv(self.headdim, self.plan.mix[1])),
            *(x, z, u, self.g, self.ids, self.before, states, out),
            *(*common.leading(x, z, u), *self.gate_strides(), out.stride(0) // out.stride(1), self.seqlen),
            *(self.nheads, self.shared(x), self.shared(z), self.scale),
            **self.constants(*self.plan.mix),
            TURNED=turned,
        )

    def _walk(self, x: Tensor, w: Tensor, carry: Tensor | None, *, reverse: bool) -> tuple[Tensor, Tensor]:
        """The state that each chunk starts from, and the last."""
        per_span, nspans = self._spans(self._walk_tiles())
        summary = self._summary(x, w, per_span, nspans, reverse=reverse)
        entries = self.states(self.products.stored, self.nchunks)
        final = self.states()
        self._states(x, w, (carry, *summary, entries, final), per_span, nspans, reverse=reverse, summary=False)
        return entries, final

    def _summary(
        self, x: Tensor, w: Tensor, per_span: int, nspans: int, *, reverse: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        if nspans == 1:
            return None, None
        spans = self.states(torch.float32, nspans)
        decays = spans.new_empty(self.batch * self.nheads, nspans, self.d_state)
        self._states(x, w, (None, spans, decays, None, None), per_span, nspans, reverse=reverse, summary=True)
        return spans, decays

    def _states(
        self,
        x: Tensor,
        w: Tensor,
        room: tuple[Tensor | None, ...],
        per_span: int,
        nspans: int,
        *,
        reverse: bool,
        summary: bool,
    ) -> None:
        constants = self.constants(*self.plan.states, fine=False)
        common.launch(
            kernels.states,
            (self.batch * self.nheads * nspans, self._walk_tiles()),
            *(x, w, self.g, self.ids, self.before, *room, *common.leading(x, w), *self.gate_strides()),
            *(self.seqlen, self.nheads, self.shared(x), per_span, nspans, self.scale),
            **constants,
            REVERSE=reverse,
            SUMMARY=summary,
        )

    def _walk_tiles(self) -> int:
        return triton.cdiv(self.d_state, self.plan.states[0]) * triton.cdiv(self.headdim, self.plan.states[1])

    def _spans(self, tiles: int) -> tuple[int, int]:
        """Chunks per span and spans: as few as fill half of the device, each of two chunks at least."""
        wanted = PROGRAMS // (self.batch * self.nheads * tiles)
        wanted = max(1, min(wanted, MOST_SPANS, self.nchunks // 2))
        per_span = triton.cdiv(self.nchunks, wanted)
        return per_span, triton.cdiv(self.nchunks, per_span)
