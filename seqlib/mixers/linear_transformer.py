"""Linear attention with a feature map and the denominator of the softmax it stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlib.errors import ConfigError, UnsupportedInput
from seqlib.layers.ending import NormLinear, RatioLinear
from seqlib.layers.feature_maps import FEATURE_MAPS, SIGNED, feature_size
from seqlib.layers.init import linear_
from seqlib.layers.linear import Linear
from seqlib.layers.positions import advance, positions
from seqlib.layers.steps import project
from seqlib.mixers.base import MixerConfig, positive, unpadded
from seqlib.mixers.matrix import MatrixMixer, MatrixState, divide
from seqlib.ops import linear_attention
from seqlib.sequence import SequenceInfo

__all__ = ["LinearTransformer", "LinearTransformerConfig"]


@dataclass(frozen=True, kw_only=True)
class LinearTransformerConfig(MixerConfig):
    """Hyperparameters of `LinearTransformer`."""

    kind: str = "linear_transformer"
    nheads: int = 8
    d_feature: int | None = None
    """Width of each query and key before the feature map; None is d_model / nheads, the width of the values."""
    feature_map: str = "elu1"
    """"elu1" (elu(x) + 1), "relu" or "taylor" (see `layers.feature_maps`); unnormalised also "elu" and "identity"."""
    normalized: bool = True
    """Divide by phi(q) . sum of phi(k) + eps."""
    eps: float = 1e-6
    causal: bool = True
    """False sees the whole sequence; such a layer has no state to go on from."""
    bias: bool = False
    lra_faithful: bool = False
    """Padding counts as tokens, as in google-research/long-range-arena."""

    def __post_init__(self) -> None:
        positive(self, "nheads", "d_feature")
        if self.feature_map not in FEATURE_MAPS:
            raise ConfigError(
                f"{self.kind}: unknown feature_map {self.feature_map!r}; known: {', '.join(sorted(FEATURE_MAPS))}"
            )
        if self.feature_map in SIGNED and self.normalized:
            raise ConfigError(f"{self.kind}: {self.feature_map} features can be negative; set normalized=False")


class LinearTransformer(MatrixMixer[LinearTransformerConfig]):
    """Linear attention, normalised.

        S_t = S_{t-1} + phi(k_t)^T v_t;   z_t = z_{t-1} + phi(k_t)
        y_t = o_proj(phi(q_t) S_t / (phi(q_t) . z_t + eps))

    State: `MatrixState`; z is the last column of S, made by a column of ones beside v.

    Source: Katharopoulos et al. 2020 (arXiv 2006.16236), eq. 9-12 (elu + 1, and causal as eq. 16-20).
    """

    Config: ClassVar[type[MixerConfig]] = LinearTransformerConfig
    supports: ClassVar[frozenset[str]] = frozenset({"packed", "padded", "initial_state", "bidirectional"})

    def __init__(self, config: LinearTransformerConfig, d_model: int, **place: Any) -> None:
        super().__init__(config, d_model, **place)
        c = config
        headdim = divide(c.kind, "d_model", d_model, "nheads", c.nheads)
        d_feature = c.d_feature or headdim
        self.matrix_shape = (c.nheads, feature_size(c.feature_map, d_feature), headdim + c.normalized)
        self.q_proj = Linear(d_model, c.nheads * d_feature, bias=c.bias)
        self.k_proj = Linear(d_model, c.nheads * d_feature, bias=c.bias)
        self.v_proj = Linear(d_model, d_model, bias=c.bias)
        self.o_proj = Linear(d_model, d_model, bias=c.bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for layer in (self.q_proj, self.k_proj, self.v_proj):
            linear_(layer)
        linear_(self.o_proj, self.residual_scale)

    def forward(
        self, x: Tensor, state: MatrixState | None = None, seq: SequenceInfo | None = None
    ) -> tuple[Tensor, MatrixState]:
        self.check(x, seq)
        if self.config.lra_faithful:
            seq = unpadded(self.config, seq)
        matrix, before = (None, None) if state is None else (state.state, state.length)
        q, k, v = self._heads(x)
        if self.counts:
            q, k = self.placed(q, k, positions(x, before, seq))
        if self.config.normalized:
            v = F.pad(v, (0, 1), value=1.0)
        y, matrix = linear_attention(
            q, k, v, initial_state=matrix, causal=self.config.causal, seq=seq, backend=self.backend("linear_attention")
        )
        return self.end(x)(y), MatrixState(matrix, length=advance(x, before, seq) if self.counts else None)

    def step(self, x: Tensor, state: MatrixState) -> tuple[Tensor, MatrixState]:
        if not self.config.causal:
            raise UnsupportedInput(f"{self.config.kind} with causal=False cannot decode token by token")
        q, k, v = self._heads(x)
        if state.length is not None:
            q, k = self.placed(q, k, state.length)
            state.length += 1
        return self.end(x).step(q, k, v, None, state.state, config=self.config.backend), state

    def placed(self, q: Tensor, k: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Features that know the positions of their tokens, for subclasses that count them."""
        return q, k

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c = self.config
        q, k, v = (t.unflatten(-1, (c.nheads, -1)) for t in project(x, self.q_proj, self.k_proj, self.v_proj))
        q, k = self._features(q, k)
        return q, k, v

    def _features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        features = FEATURE_MAPS[self.config.feature_map]
        if q.dim() == 3:  # of one token a copy costs less than the calls
            q, k = features(torch.stack((q, k)))
            return q, k
        return features(q), features(k)

    def end(self, x: Tensor) -> RatioLinear | NormLinear:
        """What is done to what is read from the state of inputs like x."""
        return RatioLinear(self.o_proj, self.config.eps if self.config.normalized else None, x.dtype)
