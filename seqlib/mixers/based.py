"""The linear part of Based: attention by the second-order Taylor polynomial of the exponential."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from seqlib.mixers.base import MixerConfig
from seqlib.mixers.linear_transformer import LinearTransformer, LinearTransformerConfig

__all__ = ["Based", "BasedConfig"]


@dataclass(frozen=True, kw_only=True)
class BasedConfig(LinearTransformerConfig):
    """Hyperparameters of `Based`."""

    kind: str = "based"
    nheads: int = 16
    d_feature: int | None = 16
    feature_map: str = "taylor"
    eps: float = 1e-12


class Based(LinearTransformer):
    """`LinearTransformer` with Taylor features of narrow queries and keys.

        y_t = sum_{s<=t} w_ts v_s / sum_{s<=t} w_ts,   w_ts = 1 + q_t . k_s / sqrt(d) + (q_t . k_s)^2 / (2 d)

    The released models mix it with `sliding_attention` of window 256 and `gated_conv` (`models.presets`). State: 153
    rows per head at d_feature 16, where unpacked products would take 273.

    Source: Arora et al. 2024 (Based, arXiv 2402.18668), section 4; HazyResearch/based, linear_attention.py.
    """

    Config: ClassVar[type[MixerConfig]] = BasedConfig
