"""A gated short convolution, the local mixer of Based."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from seqlib.layers.init import linear_
from seqlib.layers.linear import Linear
from seqlib.layers.short_conv import ShortConv
from seqlib.mixers.base import Mixer, MixerConfig, positive
from seqlib.sequence import SequenceInfo, State

__all__ = ["GatedConv", "GatedConvConfig", "GatedConvState"]


@dataclass(frozen=True, kw_only=True)
class GatedConvConfig(MixerConfig):
    """Hyperparameters of `GatedConv`; the defaults are those of Based."""

    kind: str = "gated_conv"
    d_conv: int = 3
    expand: int = 2
    """Width inside = expand * d_model."""
    conv_bias: bool = True
    bias: bool = True

    def __post_init__(self) -> None:
        positive(self, "d_conv", "expand")


@dataclass
class GatedConvState(State):
    """conv: (batch, d_conv - 1, expand * d_model), the last inputs of the convolution."""

    conv: Tensor


class GatedConv(Mixer[GatedConvConfig]):
    """Short convolution times a gate (BaseConv).

        u, g = in_proj(x);  y = out_proj(silu(causal_conv1d(u)) * g)

    It sees d_conv tokens and no further; hybrids use it for what is local.

    Source: Arora et al. 2024 (Based, arXiv 2402.18668), appendix; HazyResearch/based, base_conv.py.
    """

    Config: ClassVar[type[MixerConfig]] = GatedConvConfig

    def __init__(self, config: GatedConvConfig, d_model: int, **place: Any) -> None:
        super().__init__(config, d_model, **place)
        inner = config.expand * d_model
        self.in_proj = Linear(d_model, 2 * inner, bias=config.bias)
        self.conv1d = ShortConv(inner, config.d_conv, bias=config.conv_bias)
        self.out_proj = Linear(inner, d_model, bias=config.bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        linear_(self.in_proj)
        self.conv1d.reset_parameters()
        linear_(self.out_proj, self.residual_scale)

    def forward(
        self, x: Tensor, state: GatedConvState | None = None, seq: SequenceInfo | None = None
    ) -> tuple[Tensor, GatedConvState]:
        self.check(x, seq)
        u, gate = self.in_proj(x).chunk(2, -1)
        u, conv = self.conv1d(u, None if state is None else state.conv, seq)
        return self.out_proj(u * gate), GatedConvState(conv)

    def step(self, x: Tensor, state: GatedConvState) -> tuple[Tensor, GatedConvState]:
        u, gate = self.in_proj(x).chunk(2, -1)
        return self.out_proj(self.conv1d.step(u, state.conv) * gate), state

    def initial_state(
        self,
        batch: int,
        max_seqlen: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> GatedConvState:
        return GatedConvState(self.conv1d.initial_state(batch, device, dtype))

    def state_bytes(self, batch: int, seqlen: int) -> int:
        channels, d_conv = self.conv1d.weight.shape
        return batch * channels * (d_conv - 1) * self.conv1d.weight.element_size()
