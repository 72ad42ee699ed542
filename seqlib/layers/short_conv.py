"""The short causal convolution that most recurrent mixers put in front of their state."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from seqlib.layers.init import uniform_
from seqlib.ops import causal_conv1d
from seqlib.ops.causal_conv1d import step
from seqlib.sequence import SequenceInfo

__all__ = ["ShortConv"]


class ShortConv(nn.Module):
    """Depthwise causal convolution of width d_conv with an optional SiLU: the parameters around `ops.causal_conv1d`.

    State: (batch, d_conv - 1, d), the last inputs, oldest first, in the dtype of the weight, because inputs change
    theirs where autocast begins or ends. Weight (d, d_conv) is the squeezed `nn.Conv1d` weight of published
    checkpoints, and so is its initialisation, U(-1/sqrt(d_conv), 1/sqrt(d_conv)).
    """

    def __init__(self, d: int, d_conv: int, *, bias: bool = True, activation: str | None = "silu") -> None:
        super().__init__()
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(d, d_conv))
        self.bias = nn.Parameter(torch.empty(d)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.weight.shape[1] ** -0.5
        uniform_(self.weight, bound)
        if self.bias is not None:
            uniform_(self.bias, bound)

    def forward(self, x: Tensor, state: Tensor | None, seq: SequenceInfo | None) -> tuple[Tensor, Tensor]:
        state = None if state is None else state.to(x.dtype)
        y, state = causal_conv1d(x, self.weight, self.bias, activation=self.activation, initial_state=state, seq=seq)
        return y, state.to(self.weight.dtype)

    def step(self, x: Tensor, state: Tensor) -> Tensor:
        """One position (batch, d); `state` is updated in place."""
        y = step(x.to(state.dtype), self.weight, self.bias, state, activation=self.activation)
        return y.to(x.dtype)

    def initial_state(self, batch: int, device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
        d, d_conv = self.weight.shape
        return torch.zeros(batch, d_conv - 1, d, device=device or self.weight.device, dtype=dtype or self.weight.dtype)

    def extra_repr(self) -> str:
        d, d_conv = self.weight.shape
        return f"{d}, d_conv={d_conv}, activation={self.activation}"
