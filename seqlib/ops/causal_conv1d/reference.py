"""The causal convolution by its definition: one position after another, with the last inputs in a window."""

from __future__ import annotations

import torch
from torch import Tensor

from seqlib.ops.documents import zero_padding
from seqlib.sequence import SequenceInfo

__all__ = ["causal_conv1d", "step"]


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str | None,
    initial_state: Tensor | None,
    seq: SequenceInfo | None,
) -> tuple[Tensor, Tensor]:
    x = zero_padding(x, seq)
    batch, seqlen, d = x.shape
    high = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight, bias = weight.to(high), None if bias is None else bias.to(high)
    starts = seq.starts if seq is not None else None
    mask = seq.padding_mask if seq is not None else None
    state = x.new_zeros(batch, weight.shape[1] - 1, d) if initial_state is None else initial_state
    ys = []
    for t in range(seqlen):
        real = x.new_ones(batch, 1, dtype=torch.bool) if mask is None else mask[:, t, None]
        if starts is not None:
            state = torch.where((starts[:, t, None] & real)[..., None], 0, state)
        window = torch.cat([state, x[:, t, None]], 1)
        y = (window.to(high) * weight.T).sum(1)
        if bias is not None:
            y = y + bias
        if activation == "silu":
            y = y * torch.sigmoid(y)
        ys.append(torch.where(real, y, 0).to(x.dtype))
        state = torch.where(real[..., None], window[:, 1:], state)
    return torch.stack(ys, 1), state


def step(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, *, activation: str | None) -> Tensor:
    y, final = causal_conv1d(x[:, None], weight, bias, activation=activation, initial_state=state, seq=None)
    state.copy_(final)
    return y[:, 0]
