"""Kernelized attention with relative positions, pair by pair in blocks, or by transforms.

Both work on documents cut out and laid side by side, so that the distance of two tokens is that of their indices. A
token that is not there has features of zero: it adds nothing to any sum.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlib.ops.attention.past import with_past
from seqlib.ops.attention.state import append
from seqlib.ops.derivatives import recomputed
from seqlib.ops.documents import documents, take
from seqlib.ops.rpe_attention.exponentials import Exponentials, relative_weights
from seqlib.ops.rpe_attention.state import ExponentialState, WindowState
from seqlib.sequence import SequenceInfo

__all__ = ["rpe_attention_direct", "rpe_attention_fft"]

BLOCK = 128
# Entries of the spectra that may exist at one time.
_SPECTRA = 1 << 23

# (q (b, h, l, n), k (b, h, s, n), values (b, h, s, p), weights (h, width), farthest, nearest) -> sums (b, h, l, p):
# the queries are the last of the s tokens, and see distances nearest <= i - j <= farthest.
_Form = Callable[[Tensor, Tensor, Tensor, Tensor, int, int], Tensor]


def rpe_attention_direct(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, **options):
    return _attend(_direct, q, k, v, bias, **options)


def rpe_attention_fft(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, **options):
    return _attend(_transformed, q, k, v, bias, **options)


def _attend(
    form: _Form,
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
    ring = state if isinstance(state, WindowState) else None

    def run(q: Tensor, keys: tuple[Tensor, ...], begin: Tensor | None, end: Tensor | None) -> Tensor:
        q, k, values = q.to(high), keys[0].to(high), F.pad(keys[1].to(high), (0, 1), value=1.0)
        j = torch.arange(q.shape[1] - k.shape[1], q.shape[1], device=q.device)
        for bound, there in ((begin, torch.ge), (end, torch.lt)):
            if bound is not None:
                k = torch.where(there(j, bound[:, None])[..., None, None], k, 0)
        q, k, values = (t.transpose(1, 2) for t in (q, k, values))
        return form(q, k, values, weights, window - 1, nearest).transpose(1, 2)

    if seq is None or seq.shape is None:
        known, begin = with_past(ring, None, (k, v), window)
        sums = run(q, known, begin, None)
    else:
        sums = q.new_zeros(q.shape[0] * q.shape[1], q.shape[2], v.shape[3] + 1, dtype=high)
        for group in documents(seq, has_state=ring is not None):
            ours, *theirs = (take(t, group.at) for t in (q, k, v))
            known, begin = with_past(ring if group.goes_on else None, group.rows, tuple(theirs), window)
            part = run(ours, known, begin, group.real.sum(1))
            sums = sums.index_copy(0, group.at[group.real], part[group.real])
        sums = sums.unflatten(0, q.shape[:2])
    final: WindowState | ExponentialState
    if exponentials is None:
        kept = append(ring, k, v, window=window, seq=seq)
        final = WindowState(kept.k, kept.v, kept.length)
    else:
        before = state.sums if isinstance(state, ExponentialState) else None
        fitted, after = _exponential(q.to(high), k.to(high), v.to(high), exponentials, before, seq)
        sums, final = sums if fitted is None else sums + fitted, ExponentialState(after)
    total = sums[..., -1:]
    if seq is not None and seq.padding_mask is not None:
        total = torch.where(seq.padding_mask[..., None, None], total, 1)
    return (sums[..., :-1] / total).to(v.dtype), final


def _direct(q: Tensor, k: Tensor, values: Tensor, weights: Tensor, farthest: int, nearest: int) -> Tensor:
    seqlen, total = q.shape[2], k.shape[2]
    # Weights from distance total - 1 down to 1 - total: a Toeplitz block is a view of them, its rows from the last up.
    line = F.pad(weights.flip(-1), (total - 1 - farthest, nearest + total - 1))

    def block(i0: int, i1: int) -> Tensor:
        at, rows = total - seqlen + i0, i1 - i0
        j0, j1 = max(0, at - farthest), min(total, at + rows - nearest)
        first = total - (at + rows - j0)
        table = line[:, first : first + rows + j1 - j0 - 1].unfold(-1, j1 - j0, 1)
        scores = (q[:, :, i0:i1].flip(2) @ k[:, :, j0:j1].transpose(-1, -2)) * table
        return (scores @ values[:, :, j0:j1]).flip(2)

    parts = []
    for i0 in range(0, seqlen, BLOCK):
        bounds = (i0, min(seqlen, i0 + BLOCK))
        parts.append(recomputed(block, *bounds))  # the scores of all blocks would be quadratic
    return torch.cat(parts, 2)


def _transformed(q: Tensor, k: Tensor, values: Tensor, weights: Tensor, farthest: int, nearest: int) -> Tensor:
    """sum_n q_n (T (k_n values)) with the Toeplitz matrix T inside a circulant one."""
    seqlen, total, dtype = q.shape[2], k.shape[2], q.dtype
    length = _fast_length(total + min(farthest, total - 1))
    # Column r holds distance r, column length - r distance -r; distances beyond the sequence are cut off.
    ahead = weights[:, -nearest : -nearest + total].double()
    behind = weights[:, max(0, 1 - nearest - total) : -nearest].double() if nearest else ahead[:, :0]
    line = torch.cat([F.pad(ahead, (0, length - ahead.shape[1] - behind.shape[1])), behind], -1)
    spectrum = torch.fft.rfft(line)[:, None, None]
    columns = values.transpose(-1, -2).double().unsqueeze(2)  # b h 1 p s

    def part(begin: int, end: int) -> Tensor:
        some = k[..., begin:end].transpose(-1, -2).double().unsqueeze(3)  # b h n 1 s
        mixed = torch.fft.irfft(torch.fft.rfft(some * columns, length) * spectrum, length)[..., total - seqlen : total]
        return torch.einsum("bhnpl,bhln->bhlp", mixed, q[..., begin:end].double())

    features = max(1, _SPECTRA // (columns.numel() // total * length))
    sums = torch.zeros((), dtype=torch.float64, device=q.device)
    for begin in range(0, q.shape[-1], features):
        bounds = (begin, min(q.shape[-1], begin + features))
        sums = sums + recomputed(part, *bounds)
    return sums.to(dtype)


def _fast_length(n: int) -> int:
    """The smallest 2^a 3^b 5^c that is at least n."""
    best = 1 << (n - 1).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            rest = -(-n // three)
            best = min(best, three << max(0, (rest - 1).bit_length()))
            three *= 3
        five *= 5
    return best


def _exponential(
    q: Tensor, k: Tensor, v: Tensor, fit: Exponentials, before: Tensor | None, seq: SequenceInfo | None
) -> tuple[Tensor | None, Tensor]:
    """What the incoming sums add to every query, and the sums after the span."""
    batch, seqlen = q.shape[:2]
    dtype = torch.complex128 if q.dtype == torch.float64 else torch.complex64
    weights, rates = fit.weights.to(dtype), fit.rates.to(dtype)
    here = torch.arange(seqlen, device=q.device).expand(batch, -1)
    first = last = torch.ones(batch, seqlen, dtype=torch.bool, device=q.device)
    if seq is not None and seq.shape is not None:
        here = seq.positions(batch, seqlen, q.device)
        real = last if seq.padding_mask is None else seq.padding_mask
        ids = seq.document_ids
        first = real if ids is None else real & (ids == 0)
        last = real if ids is None else real & (ids == ids[:, -1:])
        q = torch.where(first[..., None, None], q, 0)
        k, v = (torch.where(last[..., None, None], t, 0) for t in (k, v))
    count = last.sum(1)
    after = _powers(rates, (count[:, None] - 1 - here).clamp(min=0))  # b h m l
    values = F.pad(v, (0, 1), value=1.0)
    keys = torch.einsum("bhml,blhn->bhmnl", after, k.to(dtype))
    sums = keys @ values.transpose(1, 2).unsqueeze(2).to(dtype)  # b h m n p
    if before is None:
        return None, sums
    goes_on = torch.ones(batch, dtype=torch.bool, device=q.device)
    if seq is not None and seq.document_ids is not None:
        goes_on = seq.document_ids[:, -1] == 0
    # Filled and not multiplied with zeros: what is forgotten may be infinite.
    kept = before.masked_fill(~goes_on.view(-1, 1, 1, 1, 1), 0.0)
    sums = sums + _powers(rates, count[:, None]).unsqueeze(-1) * kept
    near = _powers(rates, here + 1) * weights[..., None]  # b h m l
    ours = torch.einsum("bhml,blhn->bhlmn", near, q.to(dtype)).flatten(3)
    fitted = (ours @ before.flatten(2, 3)).real.transpose(1, 2)
    return fitted.masked_fill(~first[..., None, None], 0.0), sums


def _powers(rates: Tensor, exponents: Tensor) -> Tensor:
    """rates (h, m) to the powers exponents (b, l): (b, h, m, l)."""
    return rates[..., None] ** exponents[:, None, None]
