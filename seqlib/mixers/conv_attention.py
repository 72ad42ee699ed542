"""Softmax attention behind a short convolution of queries, keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from seqlib.layers.short_conv import ShortConv
from seqlib.mixers.attention import Attention, AttentionConfig
from seqlib.mixers.base import MixerConfig, positive
from seqlib.ops.attention import KVState
from seqlib.sequence import SequenceInfo, State

__all__ = ["ConvAttention", "ConvAttentionConfig", "ConvAttentionState"]


@dataclass(frozen=True, kw_only=True)
class ConvAttentionConfig(AttentionConfig):
    """Hyperparameters of `ConvAttention`."""

    kind: str = "conv_attention"
    d_conv: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "d_conv")


@dataclass
class ConvAttentionState(State):
    """kv: keys and values; conv: (batch, d_conv - 1, channels), the last inputs of the convolution."""

    kv: KVState
    conv: Tensor


class ConvAttention(Attention):
    """`Attention` whose q, k, v = causal_conv1d(q_proj(x), k_proj(x), v_proj(x)), without an activation.

    Rows of `conv1d` are q, k, v.

    Source: state-spaces/mamba, modules/mha.py, in the attention layers of mamba2attn; its cached path keeps what comes
    out of the convolution instead of what goes in, which is not followed.
    """

    Config: ClassVar[type[MixerConfig]] = ConvAttentionConfig

    def __init__(self, config: ConvAttentionConfig, d_model: int, **place: Any) -> None:
        super().__init__(config, d_model, **place)
        inner_kv = self.nheads_kv * self.headdim
        self.widths = [self.nheads * self.headdim, inner_kv, inner_kv]
        self.conv1d = ShortConv(sum(self.widths), config.d_conv, activation=None)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "conv1d"):  # not yet, when the base class calls this
            self.conv1d.reset_parameters()

    def forward(  # type: ignore[override]
        self, x: Tensor, state: ConvAttentionState | None = None, seq: SequenceInfo | None = None
    ) -> tuple[Tensor, ConvAttentionState]:
        self.check(x, seq)
        kv, before = (None, None) if state is None else (state.kv, state.conv)
        qkv, conv = self.conv1d(torch.cat(self.project(x), -1), before, seq)
        y, kv = self.attend(x, qkv.split(self.widths, -1), kv, seq)
        return y, ConvAttentionState(kv, conv)

    def step(self, x: Tensor, state: ConvAttentionState) -> tuple[Tensor, ConvAttentionState]:  # type: ignore[override]
        qkv = self.conv1d.step(torch.cat(self.project(x), -1), state.conv)
        y, state.kv = self.attend_step(x, qkv[:, None].split(self.widths, -1), state.kv)
        return y, state

    def initial_state(  # type: ignore[override]
        self,
        batch: int,
        max_seqlen: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> ConvAttentionState:
        kv = super().initial_state(batch, max_seqlen, device, dtype)
        return ConvAttentionState(kv, self.conv1d.initial_state(batch, device, dtype))

    def state_bytes(self, batch: int, seqlen: int) -> int:
        channels, d_conv = self.conv1d.weight.shape
        return super().state_bytes(batch, seqlen) + batch * channels * (d_conv - 1) * self.conv1d.weight.element_size()
