"""TransNormer's two mixers: linear attention with a norm in place of the denominator, and attention within blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from seqlib.errors import ConfigError
from seqlib.layers.ending import NormLinear
from seqlib.layers.lrpe import HouseholderLRPE
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
    lrpe: bool = False
    """Relative positions by a mirror and learned rotations (`layers.lrpe.HouseholderLRPE`), after the feature map."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalized:
            raise ConfigError("transnormer: the norm replaces the denominator; use kind 'linear_transformer' for one")


_EPS = 1e-16  # of a norm whose published form adds 1e-8 to the root and not under it


class TransNormer(LinearTransformer):
    """NormAttention.

        S_t = S_{t-1} + phi(k_t)^T v_t;   y_t = o_proj(rms_norm(phi(q_t) S_t)),   phi = 1 + elu (T2) or elu (T1)

    The norm has no weights and is over all heads together; without a denominator gradients stay bounded.

    Source: Qin et al. 2022 (TransNormer, arXiv 2210.10340), section 4.1; OpenNLPLab/fairseq-evo.
    """

    Config: ClassVar[type[MixerConfig]] = TransNormerConfig

    def __init__(self, config: TransNormerConfig, d_model: int, **place: Any) -> None:
        super().__init__(config, d_model, **place)
        self.counts = config.lrpe
        self.lrpe = HouseholderLRPE(self.matrix_shape[1]) if config.lrpe else None

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for layer in self.children():  # the base class asks before there is one
            if isinstance(layer, HouseholderLRPE):
                layer.reset_parameters()

    def param_groups(self) -> list[tuple[list[str], dict[str, Any]]]:
        return [] if self.lrpe is None else [(["lrpe.theta"], {"weight_decay": 0.0})]

    def placed(self, q: Tensor, k: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        assert self.lrpe is not None
        q, k = self.lrpe(at, q, k)
        return q, k

    def end(self, x: Tensor) -> NormLinear:
        return NormLinear(self.o_proj, None, group_size=self.d_model, eps=_EPS)


@dataclass(frozen=True, kw_only=True)
class DiagAttentionConfig(AttentionConfig):
    """Hyperparameters of `DiagAttention`; `window` is the length of a block."""

    kind: str = "diag_attention"
    window: int | None = 64
    rotary: bool = False
    activation: str = "softmax"
    """"softmax" (T2), or "relu" (T1): rectified scores without a denominator, and a norm over all heads after."""
    lrpe: bool = False
    """As in `TransNormerConfig`, in place of rotary."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation not in ("softmax", "relu"):
            raise ConfigError(f"diag_attention: activation must be 'softmax' or 'relu', got {self.activation!r}")
        if self.lrpe and self.rotary:
            raise ConfigError("diag_attention: lrpe is a rotation itself; choose lrpe or rotary")
        if self.window is None:
            raise ConfigError("diag_attention: window, the length of a block, must be a positive integer")


class DiagAttention(Attention):
    """Attention within blocks of `window` tokens that do not overlap (DiagAttention).

        softmax (T2):  y = o_proj(attention(q, k, v))    over the tokens of the same block, the current one the last
        relu (T1):     y = o_proj(rms_norm(relu(scale q k^T) v))                                         when causal

    Blocks are counted from the start of each document. State: `KVState` of the current block.

    Source: Qin et al. 2022 (TransNormer, arXiv 2210.10340), section 4.2; OpenNLPLab/lra,
    x_attention/norm_local_attention.py, except that its causal softmax masks after dividing.
    """

    Config: ClassVar[type[MixerConfig]] = DiagAttentionConfig
    layer_type: ClassVar[str] = "sliding_attention"

    def __init__(self, config: DiagAttentionConfig, d_model: int, **place: Any) -> None:
        super().__init__(config, d_model, **place)
        self.relu = config.activation == "relu"
        self.lrpe = HouseholderLRPE(self.headdim) if config.lrpe else None

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for layer in self.children():  # the base class asks before there is one
            if isinstance(layer, HouseholderLRPE):
                layer.reset_parameters()

    def param_groups(self) -> list[tuple[list[str], dict[str, Any]]]:
        return [] if self.lrpe is None else [(["lrpe.theta"], {"weight_decay": 0.0})]

    def _heads(
        self, qkv: tuple[Tensor, ...], x: Tensor, state: KVState | None, seq: SequenceInfo | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super()._heads(qkv, x, state, seq)
        if self.lrpe is not None:
            q, k = self.lrpe(positions(x, None if state is None else state.length, seq), q, k)
        return q, k, v

    def _out(self, y: Tensor, x: Tensor) -> Tensor:
        return super()._out(rms_norm(y.flatten(-2), None, eps=_EPS).view_as(y) if self.relu else y, x)

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
