"""One token of attention, in place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlib.context import undisturbed
from seqlib.errors import UnsupportedInput
from seqlib.ops.attention.state import KVState
from seqlib.ops.decays import FORGETS

__all__ = ["step"]


@undisturbed
def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: KVState,
    log_decay: Tensor | None = None,
    *,
    window: int | None = None,
    scale: float | None = None,
    relu: bool = False,
) -> Tensor:
    """Attend one new token per row to itself and to the state, which takes it up in place.

        state.k[b, slot] = k[b], state.v[b, slot] = v[b], state.length += 1
        y = softmax(scale * q k^T + decays) v over the filled slots

    Static shapes and no wait for the device, so it can be captured in a graph. Meant for torch.no_grad: what it writes
    over is gone for a backward pass.

    Args:
        q: (batch, nheads, headdim).
        k: (batch, nheads_kv, headdim), v: (batch, nheads_kv, headdim_v), in the dtype of q; nheads_kv divides nheads.
        state: a full cache with a free slot in every row (KVState.reserve makes room), or a ring of capacity = window.
        log_decay: (batch, nheads), at most 0; with a state that holds decays, and only then.
        window: tokens that are seen, the new one included; None for all.
        scale: of the scores; None is 1/sqrt(headdim).
        relu: weigh by relu(scores) in place of the softmax.

    Returns:
        (batch, nheads, headdim_v) in the dtype of q.

    Raises:
        UnsupportedInput: the state does not fit, or a full cache on the CPU has no free slot. On a GPU that would take
            a wait for the device; there the write itself fails.
    """
    batch, capacity = state.k.shape[:2]
    if (k.shape, v.shape) != ((batch, *state.k.shape[2:]), (batch, *state.v.shape[2:])):
        raise UnsupportedInput(
            f"k and v must be (batch, nheads_kv, headdim) of the state {tuple(state.k.shape)}, {tuple(state.v.shape)}; "
            f"got {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if window is not None and capacity != window:
        raise UnsupportedInput(f"a window of {window} needs a state of that capacity, got {capacity}")
    if (log_decay is None) != (state.log_decay is None):
        raise UnsupportedInput("log_decay must be given with a state that holds decays, and only then")
    filled: int | None = None
    if state.length.device.type == "cpu" and not torch.compiler.is_compiling():
        filled = int(state.length.max()) + 1
        if window is None and filled > capacity:
            raise UnsupportedInput(f"the cache holds {capacity} tokens and is full; make room with state.reserve(...)")
        filled = min(filled, capacity)

    rows = torch.arange(batch, device=k.device)
    slot = state.length if window is None else state.length % capacity
    state.k[rows, slot] = k
    state.v[rows, slot] = v
    if log_decay is not None and state.log_decay is not None:
        old = torch.arange(capacity, device=k.device) < state.length[:, None]
        bounded = log_decay[:, None].to(state.log_decay.dtype).clamp(min=-FORGETS)
        state.log_decay += torch.where(old[..., None], bounded, 0)
        state.log_decay[rows, slot] = 0
    state.length += 1
    keys, values = (t[:, :filled].transpose(1, 2) for t in (state.k, state.v))
    live = torch.arange(keys.shape[2], device=k.device) < state.length[:, None]
    mask = live[:, None, None]
    if state.log_decay is not None:
        bias = state.log_decay[:, :filled].transpose(1, 2).unflatten(1, (k.shape[1], -1))
        mask = torch.where(mask, bias, -torch.inf).to(q.dtype)
    # The query heads of one key head stand where the queries stand, so keys and values are read as they lie.
    groups = q.unflatten(1, (k.shape[1], -1))
    if relu:
        scores = (groups @ keys.transpose(-1, -2)).relu() * (q.shape[-1] ** -0.5 if scale is None else scale)
        return (torch.where(mask, scores, 0) @ values).flatten(1, 2)
    y = F.scaled_dot_product_attention(groups, keys, values, mask, scale=scale)
    return y.flatten(1, 2)
