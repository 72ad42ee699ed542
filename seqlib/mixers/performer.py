"""Performer: softmax attention through random features."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from seqlib.errors import ConfigError
from seqlib.layers.init import fill_
from seqlib.mixers.base import MixerConfig, positive, wide
from seqlib.mixers.linear_transformer import LinearTransformer, LinearTransformerConfig

__all__ = ["Performer", "PerformerConfig", "orthogonal_features"]


@dataclass(frozen=True, kw_only=True)
class PerformerConfig(LinearTransformerConfig):
    """Hyperparameters of `Performer`; feature_map is the kernel."""

    kind: str = "performer"
    feature_map: str = "softmax"
    """"softmax" (positive features) or "relu" (relu(W x) + kernel_eps), which Long Range Arena takes with 256 features,
    but for ListOps, which has 2 softmax features there."""
    n_features: int | None = None
    """None is headdim * ln(headdim)."""
    kernel_eps: float = 1e-3
    eps: float = 1e-9

    def __post_init__(self) -> None:
        positive(self, "nheads", "n_features")
        if self.feature_map not in ("softmax", "relu") or not self.normalized or self.d_feature is not None:
            raise ConfigError(
                "performer: feature_map must be softmax or relu, with normalized=True and no d_feature "
                f"(n_features counts its features); got {self.feature_map!r}"
            )


class Performer(LinearTransformer):
    """`LinearTransformer` with random features whose products are those of the softmax on average.

        phi(x) = exp(W x / d^(1/4) - |x|^2 / (2 sqrt(d))) / sqrt(n_features)

    W is drawn once, in orthogonal blocks, and saved with the model. Each query's largest exponent is taken off before
    the exponential, which the denominator cancels; keys are left as they are, because a largest one over the sequence
    would look ahead.

    Source: Choromanski et al. 2021 (arXiv 2009.14794), eq. 5 and section 2.4, which draws W anew now and then.
    """

    Config: ClassVar[type[MixerConfig]] = PerformerConfig
    config: PerformerConfig
    features: Tensor

    def __init__(self, config: PerformerConfig, d_model: int, **place: Any) -> None:
        super().__init__(config, d_model, **place)
        nheads, headdim, columns = self.matrix_shape
        n = config.n_features or max(1, int(headdim * math.log(headdim)))
        self.matrix_shape = (nheads, n, columns)
        self.register_buffer("features", torch.empty(n, headdim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "features"):
            fill_(self.features, orthogonal_features(*self.features.shape))

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super()._heads(x)
        return q, k, wide(v)

    def _features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self._map(q, True), self._map(k, False)

    def _map(self, x: Tensor, query: bool) -> Tensor:
        x, W = wide(x) * x.shape[-1] ** -0.25, wide(self.features)
        if self.config.feature_map == "relu":
            return torch.relu(x @ W.t()) + self.config.kernel_eps
        exponent = x @ W.t() - x.square().sum(-1, keepdim=True) / 2
        if query:
            exponent = exponent - exponent.detach().amax(-1, keepdim=True)
        return exponent.exp() * W.shape[0] ** -0.5


def orthogonal_features(n: int, d: int) -> Tensor:
    """(n, d) Gaussian rows, orthogonal within blocks of d."""
    f32 = torch.float32  # QR knows no 16-bit numbers, whatever the default is
    blocks = [torch.linalg.qr(torch.randn(d, d, dtype=f32))[0].t() for _ in range(-(-n // d))]
    return torch.cat(blocks)[:n] * torch.randn(n, d, dtype=f32).norm(dim=1, keepdim=True)
