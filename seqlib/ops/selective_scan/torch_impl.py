"""The selective scan in chunks: states inside a chunk live only while it is worked on, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlib.ops.derivatives import recomputed
from seqlib.ops.selective_scan.summary import state_dtype
from seqlib.sequence import SequenceInfo

__all__ = ["chunked", "step"]

CHUNK = 64


def chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    seq: SequenceInfo | None,
) -> tuple[Tensor, Tensor]:
    wide = state_dtype(x, A)
    h = x.new_zeros(x.shape[0], *A.shape, dtype=wide) if initial_state is None else initial_state.to(wide)
    starts, real = (None, None) if seq is None else (seq.starts, seq.padding_mask)
    ys = []
    pieces = zip(*(_split(t, x.shape[1]) for t in (x, dt, B, C, z, starts, real)))
    for x_c, dt_c, B_c, C_c, z_c, starts_c, real_c in pieces:
        given = (h, x_c, dt_c, A, B_c, C_c, D, z_c, dt_bias, dt_softplus, starts_c, real_c)
        y, h = recomputed(_chunk, *given)  # a chunk's states are not kept
        ys.append(y)
    return torch.cat(ys, 1), h


def step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    *,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    now = (None if t is None else t.unsqueeze(1) for t in (x, dt, B, C, z))
    x, dt, B, C, z = now  # type: ignore[assignment]
    y, h = _chunk(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, None, None)
    state.copy_(h)
    return y.squeeze(1)


def _split(t: Tensor | None, seqlen: int) -> Iterator[Tensor | None]:
    """The chunks of a tensor; what does not run along the sequence is repeated."""
    if t is None or (t.dim() == 2 and t.dtype != torch.bool):
        return iter([t] * -(-seqlen // CHUNK))
    # split, not slicing: its backward joins the gradients once instead of padding each to full length.
    return iter(t.split(CHUNK, 1))


def _chunk(
    h: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    starts: Tensor | None,
    real: Tensor | None,
) -> tuple[Tensor, Tensor]:
    wide = h.dtype
    high = wide.to_real()
    d_inner = x.shape[-1]
    out = x.dtype
    if real is not None:
        x, dt, B, C = (t if t.dim() == 2 else _clear(t, ~real) for t in (x, dt, B, C))
        z = None if z is None else _clear(z, ~real)
    x, delta, A, B, C = x.to(high), dt.to(high), A.to(wide), B.to(wide), C.to(wide)
    if dt_bias is not None:
        delta = delta + dt_bias.to(high)
    if dt_softplus:
        delta = F.softplus(delta)
    if real is not None:
        delta = _clear(delta, ~real)  # decay 1, input 0

    a = torch.exp(delta.unsqueeze(-1) * A)  # b q e n
    b = (delta * x).unsqueeze(-1) * _per_channel(B, d_inner)
    hs = []
    # unbind, not indexing: its backward stacks the gradients once.
    forgets = [None] * a.shape[1] if starts is None else starts[..., None, None].unbind(1)
    for a_t, b_t, forget in zip(a.unbind(1), b.unbind(1), forgets):
        # Filled and not multiplied with zeros: what is forgotten may be infinite.
        h = torch.addcmul(b_t, a_t, h if forget is None else h.masked_fill(forget, 0.0))
        hs.append(h)
    y = (torch.stack(hs, 1) * _per_channel(C, d_inner)).sum(-1)
    y = 2 * y.real if wide.is_complex else y
    if D is not None:
        y = y + D.to(high) * x
    if z is not None:
        y = y * F.silu(z.to(high))
    return (y if real is None else _clear(y, ~real)).to(out), h


def _per_channel(M: Tensor, d_inner: int) -> Tensor:
    """B or C (batch, seqlen, [ngroups,] d_state) seen from each channel; a constant one already is."""
    if M.dim() == 2:
        return M
    M = M.unsqueeze(2) if M.dim() == 3 else M
    return M.unsqueeze(3).expand(-1, -1, -1, d_inner // M.shape[2], -1).flatten(2, 3)


def _clear(t: Tensor, where: Tensor) -> Tensor:
    return t.masked_fill(where.view(*where.shape, *[1] * (t.dim() - 2)), 0.0)
