"""Learned absolute positions, as a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from seqlib.errors import UnsupportedInput
from seqlib.layers.init import normal_
from seqlib.layers.positions import advance, positions
from seqlib.mixers.base import Mixer, MixerConfig, positive
from seqlib.sequence import SequenceInfo, State

__all__ = ["LearnedPositions", "LearnedPositionsConfig", "PositionState"]


@dataclass(frozen=True, kw_only=True)
class LearnedPositionsConfig(MixerConfig):
    """Hyperparameters of `LearnedPositions`."""

    kind: str = "learned_positions"
    max_seqlen: int = 4096
    """Longest document."""
    init_std: float = 0.02

    def __post_init__(self) -> None:
        positive(self, "max_seqlen")


@dataclass
class PositionState(State):
    """length: (batch,) int64, real tokens of the document so far."""

    length: Tensor


class LearnedPositions(Mixer[LearnedPositionsConfig]):
    """A vector per position, whatever stands there.

        y_t = P[t],   t counted in real tokens of the document

    As the first layer of a pattern ("p a*6") it adds positions to the embeddings, for mixers that know of none.

    Source: Vaswani et al. 2017 (arXiv 1706.03762), section 3.5 (learned); google-research/long-range-arena.
    """

    Config: ClassVar[type[MixerConfig]] = LearnedPositionsConfig
    reads_input: ClassVar[bool] = False

    def __init__(self, config: LearnedPositionsConfig, d_model: int, **place: Any) -> None:
        super().__init__(config, d_model, **place)
        self.P = nn.Parameter(torch.empty(config.max_seqlen, d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        normal_(self.P, self.config.init_std)

    def forward(
        self, x: Tensor, state: PositionState | None = None, seq: SequenceInfo | None = None
    ) -> tuple[Tensor, PositionState]:
        self.check(x, seq)
        length = None if state is None else state.length
        at = positions(x, length, seq)
        self._refuse_beyond(at)
        y = self.P[at].expand_as(x)
        if seq is not None and seq.padding_mask is not None:
            y = y * seq.padding_mask[..., None]
        return y, PositionState(advance(x, length, seq))

    def _refuse_beyond(self, at: Tensor) -> None:
        if torch.compiler.is_compiling():
            return  # a graph cannot look at values; the table's own bounds hold there
        most = int(at.max()) + 1
        if most > self.config.max_seqlen:
            raise UnsupportedInput(
                f"learned_positions has {self.config.max_seqlen} positions, got a document of {most}; raise max_seqlen "
                "or cut"
            )

    def step(self, x: Tensor, state: PositionState) -> tuple[Tensor, PositionState]:
        self._refuse_beyond(state.length)
        y = self.P[state.length]
        state.length += 1
        return y, state

    def initial_state(
        self,
        batch: int,
        max_seqlen: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> PositionState:
        return PositionState(torch.zeros(batch, dtype=torch.long, device=device or self.P.device))

    def state_bytes(self, batch: int, seqlen: int) -> int:
        return batch * torch.long.itemsize
