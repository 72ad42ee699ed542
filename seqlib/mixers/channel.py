"""A channel mixer in the place of a sequence mixer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from seqlib.layers.mlp import MLPConfig
from seqlib.layers.moe import channel_config, channel_mixer
from seqlib.mixers.base import Mixer, MixerConfig
from seqlib.sequence import SequenceInfo, State

__all__ = ["Channel", "ChannelConfig", "ChannelState"]


@dataclass(frozen=True, kw_only=True)
class ChannelConfig(MixerConfig):
    """Hyperparameters of `Channel`."""

    kind: str = "channel"
    mlp: MLPConfig | None = None
    """An MLP or experts, as a config or as plain values; None is a plain MLP."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "mlp", channel_config(self.mlp) or MLPConfig())

    def to_dict(self) -> dict[str, Any]:
        assert self.mlp is not None
        return super().to_dict() | {"mlp": self.mlp.to_dict()}


@dataclass
class ChannelState(State):
    """Nothing is carried from one position to the next."""


class Channel(Mixer[ChannelConfig]):
    """y = mlp(x), position by position: for stacks in which MLPs are layers of their own.

    Source: layers "-" and "E" of Nemotron-H (NVIDIA 2025, arXiv 2504.03624), section 2.
    """

    Config: ClassVar[type[MixerConfig]] = ChannelConfig

    def __init__(self, config: ChannelConfig, d_model: int, **place: Any) -> None:
        super().__init__(config, d_model, **place)
        assert config.mlp is not None
        self.mlp = channel_mixer(config.mlp, d_model, residual_scale=self.residual_scale)

    def reset_parameters(self) -> None:
        self.mlp.reset_parameters()

    def forward(self, x: Tensor, state: Any = None, seq: SequenceInfo | None = None) -> tuple[Tensor, ChannelState]:
        self.check(x, seq)
        return self.mlp(x), ChannelState()

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, ChannelState]:
        return self.mlp(x), state

    def initial_state(
        self,
        batch: int,
        max_seqlen: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> ChannelState:
        return ChannelState()

    def state_bytes(self, batch: int, seqlen: int) -> int:
        return 0
