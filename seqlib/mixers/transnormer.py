"""TransNormer's two mixers: linear attention with a norm in place of the denominator, and attention within blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from seqlib.errors import ConfigError
from seqlib.layers.positions import positions
from seqlib.mixers.attention import Attention, AttentionConfig
from seqlib.mixers.base import MixerConfig
from seqlib.mixers.linear_transformer import LinearTransformer, LinearTransformerConfig
from seqlib.ops import rms_norm
from seqlib.ops.attention import KVState
from seqlib.sequence import SequenceInfo

__all__ = ["DiagAttention", "DiagAttentionConfig", "TransNormer", "TransNormerConfig"]


@dataclass(frozen=True, kw_only=True)
class TransNormerConfig(LinearTransformerConfig):
    """Hyperparameters of `TransNormer`; the default feature map is that of T2, "elu" that of T1."""

    kind: str = "transnormer"
    normalized: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalized:
            raise ConfigError("transnormer: the norm replaces the denominator; use kind 'linear_transformer' for one")


class TransNormer(LinearTransformer):
    """NormAttention.

        S_t = S_{t-1} + phi(k_t)^T v_t;   y_t = o_proj(rms_norm(phi(q_t) S_t)),   phi = 1 + elu (T2) or elu (T1)

    The norm has no weights and is over all heads together; without a denominator gradients stay bounded.

    Source: Qin et al. 2022 (TransNormer, arXiv 2210.10340), section 4.1; OpenNLPLab/fairseq-evo.
    """

    Config: ClassVar[type[MixerConfig]] = TransNormerConfig

    def _out(self, y: Tensor) -> Tensor:
        # The published norm adds 1e-8 to the root and not under it.
        return self.o_proj(rms_norm(y.flatten(-2), None, eps=1e-16))


@dataclass(frozen=True, kw_only=True)
class DiagAttentionConfig(AttentionConfig):
    """Hyperparameters of `DiagAttention`; `window` is the length of a block."""

    kind: str = "diag_attention"
    window: int | None = 64
    rotary: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is None:
            raise ConfigError("diag_attention: window, the length of a block, must be a positive integer")


class DiagAttention(Attention):
    """Softmax attention within blocks of `window` tokens that do not overlap (DiagAttention, T2).

        y = o_proj(attention(q, k, v))       over the tokens of the same block, up to the current one when causal

    Blocks are counted from the start of each document. State: `KVState` of the current block.

    Source: Qin et al. 2022 (TransNormer, arXiv 2210.10340), section 4.2. T1's relu in place of the softmax is not here.
    """

    Config: ClassVar[type[MixerConfig]] = DiagAttentionConfig
    layer_type: ClassVar[str] = "sliding_attention"

    def forward(
        self, x: Tensor, state: KVState | None = None, seq: SequenceInfo | None = None
    ) -> tuple[Tensor, KVState]:
        self.check(x, seq)
        # A block is a document of its own: its first token forgets what came before.
        at = positions(x, None if state is None else state.length, seq)
        starts = (at % self._block == 0).expand(x.shape[:2])
        mask = None if seq is None else seq.padding_mask
        return super().forward(x, state, SequenceInfo(starts, mask, None if seq is None else seq.group))

    def step(self, x: Tensor, state: KVState) -> tuple[Tensor, KVState]:
        full = state.length == self._block
        state.length.masked_fill_(full, 0)
        for kept in (state.k, state.v, state.log_decay):
            if kept is not None:
                kept[full] = 0
        return super().step(x, state)

    @property
    def _block(self) -> int:
        assert self.config.window is not None
        return self.config.window
