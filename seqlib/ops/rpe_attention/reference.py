"""Kernelized attention with relative positions by its definition: every pair, row by row."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlib.ops.attention.reference import walk
from seqlib.ops.attention.state import append
from seqlib.ops.rpe_attention.exponentials import Exponentials, relative_weights
from seqlib.ops.rpe_attention.state import ExponentialState, WindowState
from seqlib.sequence import SequenceInfo

__all__ = ["rpe_attention"]


def rpe_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    *,
    causal: bool,
    exponentials: Exponentials | None,
    state: WindowState | ExponentialState | None,
    seq: SequenceInfo | None,
) -> tuple[Tensor, WindowState | ExponentialState]:
    high = torch.promote_types(q.dtype, torch.float32)
    weights = relative_weights(bias).to(high)
    window = weights.shape[1] if causal else (weights.shape[1] + 1) // 2
    nearest = 0 if causal else 1 - window
    ys, sums = [], []
    for b in range(q.shape[0]):
        ring = state if isinstance(state, WindowState) else None
        before = 0 if ring is None else int(ring.length[b])
        past = range(max(0, before - window + 1), before)
        document, position = walk(b, q.shape[1], before, seq)
        of_key = torch.tensor([0] * len(past) + document, device=q.device)
        at_key = torch.tensor([*past, *position], device=q.device)
        keys, values = k[b].to(high), F.pad(v[b].to(high), (0, 1), value=1.0)
        if ring is not None:
            slots = [p % window for p in past]
            keys = torch.cat([ring.k[b, slots].to(high), keys])
            values = torch.cat([F.pad(ring.v[b, slots].to(high), (0, 1), value=1.0), values])
        of_query, at_query = of_key[len(past) :, None], at_key[len(past) :, None]
        distance = at_query - at_key
        visible = (distance >= nearest) & (distance < window)
        table = weights[:, (distance - nearest).clamp(0, weights.shape[1] - 1)] * visible  # h l s
        y = values.new_zeros(len(document), *values.shape[1:])
        # Document by document: in a sum zero times what another one left behind may be NaN.
        for number in {*document} - {-1}:
            at, seen = ((t == number).nonzero()[:, 0] for t in (of_query[:, 0], of_key))
            some = table[:, at][..., seen]
            part = torch.einsum("lhn,shn,hls,shp->lhp", q[b, at].to(high), keys[seen], some, values[seen])
            y = y.index_copy(0, at, part)
        if exponentials is not None:
            known = _known(state, b, q, v, exponentials)
            counted = torch.tensor([d == 0 for d in document], device=q.device)
            away = (torch.tensor(position, device=q.device) + 1) * counted
            fitted = torch.einsum(
                "lhm,lhn,hmnp->lhp",
                (exponentials.weights * exponentials.rates ** away[:, None, None]).to(known.dtype),
                q[b].where(counted[:, None, None], 0).to(known.dtype),
                known,
            )
            y = y + fitted.real.where(counted[:, None, None], 0)
            sums.append(_summed(k[b], v[b], document, known, exponentials))
        real = torch.tensor([d >= 0 for d in document], device=q.device)[:, None, None]
        ys.append(torch.where(real, y[..., :-1] / torch.where(real, y[..., -1:], 1), 0))
    out = torch.stack(ys).to(v.dtype)
    if exponentials is not None:
        return out, ExponentialState(torch.stack(sums))
    final = append(state if isinstance(state, WindowState) else None, k, v, window=window, seq=seq)
    return out, WindowState(final.k, final.v, final.length)


def _known(
    state: WindowState | ExponentialState | None, b: int, q: Tensor, v: Tensor, exponentials: Exponentials
) -> Tensor:
    if isinstance(state, ExponentialState):
        return state.sums[b]
    shape = (*exponentials.rates.shape, q.shape[-1], v.shape[-1] + 1)
    return q.new_zeros(shape, dtype=torch.complex128 if q.dtype == torch.float64 else torch.complex64)


def _summed(k: Tensor, v: Tensor, document: list[int], known: Tensor, exponentials: Exponentials) -> Tensor:
    """The sums after a row, token by token."""
    rates, current = exponentials.rates.to(known.dtype)[..., None, None], 0
    for t, number in enumerate(document):
        if number < 0:
            continue
        if number != current:
            known, current = torch.zeros_like(known), number
        token = k[t].to(known.dtype)[:, None, :, None] * F.pad(v[t], (0, 1), value=1.0).to(known.dtype)[:, None, None]
        known = rates * known + token
    return known
