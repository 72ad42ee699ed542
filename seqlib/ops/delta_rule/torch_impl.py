"""The delta rule in chunks: inside a chunk the corrections of all tokens solve one triangular system.

With G the cumulative log decay inside a chunk and S the state that enters it, the corrections U (one row per token) are

    (I + A) U = beta V - beta (exp(G) K) S,    A[t, s] = beta_t sum_n k_tn k_sn exp(G_tn - G_sn)  for s < t

and then y and the next state are those of linear attention with U in the place of V. A depends on the chunk alone, so
its inverse is found for all chunks at once and only products with the state go from chunk to chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from seqlib.ops.decays import summable
from seqlib.ops.documents import by_document
from seqlib.sequence import SequenceInfo

__all__ = ["chunked", "step"]

CHUNK = 32
SUB = 8  # positions between which decays per channel are taken pair by pair, and the largest direct solve
BLOCK = 2**19  # elements of k that are worked on at once: bounds memory beyond inputs and outputs


class Decays(NamedTuple):
    """Decays inside chunks, every factor at most 1."""

    kk: Tensor  # ... t s, scores of k_t with k_s, s < t
    qk: Tensor  # ... t s, scores of q_t with k_s, s <= t
    entry: Tensor | None  # ... t 1 or n, from the start of the chunk to t
    exit: Tensor | None  # ... t 1 or n, from t to the end of the chunk
    whole: Tensor | None  # ... 1 or n, 1


def chunked(
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
    batch, seqlen, nheads, headdim = v.shape
    d_state = k.shape[-1]
    high = torch.float64 if v.dtype == torch.float64 else torch.float32
    chunk = min(chunk_size or CHUNK, seqlen)
    S = v.new_zeros(batch, nheads, d_state, headdim, dtype=high) if initial_state is None else initial_state.to(high)
    if seq is not None and seq.starts is not None:
        # In a product of matrices zero times what another document left behind may be NaN.
        def alone(*given: Any) -> tuple[Tensor, Tensor]:
            *tensors, state, padded = given
            return chunked(*tensors, scale=scale, initial_state=state, chunk_size=chunk_size, seq=padded)

        return by_document(alone, (q, k, v, beta, log_decay), v, initial_state, S, seq)

    length = chunk * max(1, BLOCK // (batch * chunk * nheads * max(d_state, headdim)))
    given = (q, k, v, beta, log_decay, None if seq is None else seq.padding_mask)
    pieces = zip(*([None] * -(-seqlen // length) if t is None else t.split(length, 1) for t in given))
    # Recompute each block in the backward pass instead of keeping what it made.
    run: Callable[..., tuple[Tensor, Tensor]] = _block
    if torch.is_grad_enabled() and seqlen > length:
        run = partial(checkpoint, _block, use_reentrant=False, preserve_rng_state=False)
    ys = []
    for piece in pieces:
        y, S = run(S, *piece, scale, chunk)
        ys.append(y)
    return torch.cat(ys, 1), S


def step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor, scale: float
) -> Tensor:
    high, nheads = state.dtype, v.shape[1]
    q, k = (t.to(high).repeat_interleave(nheads // t.shape[1], 1).unsqueeze(2) for t in (q, k))  # b h 1 n
    if log_decay is not None:
        decay = torch.exp(log_decay.to(high))
        state.mul_(decay[..., None] if decay.dim() == 3 else decay[..., None, None])
    error = (v.to(high).unsqueeze(2) - k @ state) * beta.to(high)[..., None, None]
    state.add_(k.transpose(-1, -2) * error)
    return (scale * (q @ state)).squeeze(2).to(v.dtype)


def _block(
    S: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    real: Tensor | None,
    scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """A block of chunks from state S."""
    out, high = v.dtype, S.dtype
    seqlen, nheads = v.shape[1:3]

    def split(t: Tensor, dtype: torch.dtype = high) -> Tensor:
        """(batch, seqlen, heads, ...) to (batch, nheads, chunks, chunk, ...); no real token is zero throughout."""
        if real is not None:
            t = t.masked_fill(~real.view(*real.shape, *[1] * (t.dim() - 2)), 0.0)
        if nheads != t.shape[2]:
            t = t.repeat_interleave(nheads // t.shape[2], 2)
        t = F.pad(t.to(dtype), (0, 0) * (t.dim() - 2) + (0, -seqlen % chunk))
        return t.unflatten(1, (-1, chunk)).movedim(3, 1)

    q, k, v, beta = split(q), split(k), split(v), split(beta).unsqueeze(-1)
    # Sums of decays in float64, so that small decays after large ones keep their digits.
    G = None if log_decay is None else split(summable(log_decay), torch.float64).cumsum(3)
    decays = _decays(q, k, G)

    inverse = _UnitLowerInverse.apply(beta * decays.kk)
    read_k, read_q = (k, q) if decays.entry is None else (k * decays.entry, q * decays.entry)
    write = k if decays.exit is None else k * decays.exit
    U, W = inverse @ (beta * v), inverse @ (beta * read_k)
    states, corrections = [], []
    whole = [None] * k.shape[2] if decays.whole is None else decays.whole.unbind(2)
    # unbind, not indexing: its backward stacks the gradients once.
    for U_c, W_c, write_c, whole_c in zip(U.unbind(2), W.unbind(2), write.unbind(2), whole):
        U_c = U_c - W_c @ S
        states.append(S)
        corrections.append(U_c)
        S = (S if whole_c is None else whole_c * S) + write_c.transpose(-1, -2) @ U_c
    y = read_q @ torch.stack(states, 2) + decays.qk @ torch.stack(corrections, 2)
    y = (scale * y).movedim(1, 3).flatten(1, 2)[:, :seqlen]
    return (y if real is None else y.masked_fill(~real[..., None, None], 0.0)).to(out), S


def _decays(q: Tensor, k: Tensor, G: Tensor | None) -> Decays:
    """Scores and factors with the decay in them; G is the cumulative log decay (..., t) or (..., t, n)."""
    high, kT = k.dtype, k.transpose(-1, -2)
    if G is not None and G.dim() == k.dim():
        kk, qk = _scores_per_channel(q, k, G)
        entry, leave = G, G[..., -1:, :] - G
    else:
        kk, qk = k @ kT, q @ kT
        if G is not None:
            later = torch.ones(kk.shape[-2:], dtype=torch.bool, device=k.device).triu(1)
            pairs = (G.unsqueeze(-1) - G.unsqueeze(-2)).masked_fill(later, -torch.inf).to(high).exp()
            kk, qk = kk * pairs, qk * pairs
            entry, leave = G.unsqueeze(-1), (G[..., -1:] - G).unsqueeze(-1)
    kk, qk = kk.tril(-1), qk.tril()
    if G is None:
        return Decays(kk, qk, None, None, None)
    entry, leave = entry.to(high).exp(), leave.to(high).exp()
    return Decays(kk, qk, entry, leave, entry[..., -1, :].unsqueeze(-1))


def _scores_per_channel(q: Tensor, k: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """sum_n k_tn k_sn exp(G_tn - G_sn), and the same with q_t, for s <= t; what stands above the diagonal is not used.

    The exponential does not split into a factor of t and one of s that are both at most 1, except across the start of
    a sub-block: pairs in one sub-block are taken one by one, and all earlier ones relative to its start.
    """
    high, chunk = k.dtype, k.shape[-2]
    rows = []
    for begin in range(0, chunk, SUB):
        end = min(begin + SUB, chunk)
        here = G[..., begin:end, :]
        left = torch.stack([k[..., begin:end, :], q[..., begin:end, :]], -1)  # ... t n 2
        later = torch.ones(end - begin, end - begin, dtype=torch.bool, device=k.device).triu(1)
        pairs = (here.unsqueeze(-2) - here.unsqueeze(-3)).to(high)  # ... t s n
        pairs = pairs.masked_fill(later.unsqueeze(-1), -torch.inf).exp()
        parts = [((pairs * k[..., begin:end, :].unsqueeze(-3)) @ left).movedim(-1, -3)]  # ... 2 t s
        if begin:
            edge = G[..., begin - 1 : begin, :]
            right = k[..., :begin, :] * (edge - G[..., :begin, :]).to(high).exp()
            scaled = (left * (here - edge).to(high).exp().unsqueeze(-1)).movedim(-1, -3)  # ... 2 t n
            parts.insert(0, scaled @ right.transpose(-1, -2).unsqueeze(-3))
        rows.append(F.pad(torch.cat(parts, -1), (0, chunk - end)))
    kk, qk = torch.cat(rows, -2).unbind(-3)
    return kk, qk


class _UnitLowerInverse(torch.autograd.Function):
    """(I + A)^-1 for strictly lower triangular A."""

    @staticmethod
    def forward(ctx, A: Tensor) -> Tensor:
        X = _unit_lower_inverse(A)
        ctx.save_for_backward(X)
        return X

    @staticmethod
    def backward(ctx, dX: Tensor) -> Tensor:
        (X,) = ctx.saved_tensors
        XT = X.transpose(-1, -2)
        return -(XT @ dX @ XT).tril(-1)


def _unit_lower_inverse(A: Tensor) -> Tensor:
    """By halves; a direct solve of small blocks is never spread over threads, which costs more than it gives."""
    size = A.shape[-1]
    if size <= SUB:
        eye = torch.eye(size, dtype=A.dtype, device=A.device)
        return torch.linalg.solve_triangular(A + eye, eye.expand_as(A), upper=False, unitriangular=True)
    half = -(-size // (2 * SUB)) * SUB
    head, tail = _unit_lower_inverse(A[..., :half, :half]), _unit_lower_inverse(A[..., half:, half:])
    below = -tail @ (A[..., half:, :half] @ head)
    return torch.cat([F.pad(head, (0, size - half)), torch.cat([below, tail], -1)], -2)
