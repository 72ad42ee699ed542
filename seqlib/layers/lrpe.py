"""Relative positions for linear attention, by learned angles."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqlib.errors import ConfigError
from seqlib.layers.init import fill_, normal_
from seqlib.ops import rotate

__all__ = ["LRPE", "HouseholderLRPE"]


class LRPE(nn.Module):
    """Double the features so that products of queries and keys see their distance.

        x_t -> (x_t cos(theta t), x_t sin(theta t));   q_t . k_s = sum_d q_d k_d cos(theta_d (t - s))

    theta (nheads, headdim) is learned and starts at 10000^(-2 j / (nheads headdim)), j counting the channels of all
    heads, so that heads differ. Angles are float32: in 16 bits positions beyond 256 would be rounded.

    Source: Qin et al. 2023 (LRPE, arXiv 2307.09270), section 3; OpenNLPLab/TransNormerLLM, modeling_transnormer.py.
    """

    def __init__(self, nheads: int, headdim: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.empty(nheads, headdim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        channels = self.theta.numel()
        j = torch.arange(channels, device=self.theta.device, dtype=torch.float64).view(self.theta.shape)
        fill_(self.theta, 10000 ** (-2 * j / channels))

    def forward(self, positions: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q and k (..., nheads, headdim) as (..., nheads, 2 headdim), at integer positions (...)."""
        return rotate(q, k, self.theta, positions, pairs="doubled")


class HouseholderLRPE(nn.Module):
    """Mirror the features, then rotate neighbouring pairs, so that products of queries and keys see their distance.

        x_t -> R(theta t) (x_t - 2 (x_t . u) u),   u = v / |v|

    The mirror mixes the features of each head before they are paired; it cancels where the distance is zero. theta
    (headdim / 2) starts at 10000^(-2 i / headdim), and both are shared by all heads. Angles are float32.

    Args:
        headdim: even.
        learned: train v; otherwise it stays the random direction that it starts as.

    Source: Qin et al. 2023 (LRPE, arXiv 2307.09270), section 3; OpenNLPLab/lra, x_attention/lrpe.py (core_matrix 1,
    p_matrix 3, theta_learned), as in TransNormer.
    """

    def __init__(self, headdim: int, *, learned: bool = False) -> None:
        super().__init__()
        if headdim % 2:
            raise ConfigError(f"lrpe rotates pairs of features and needs an even number of them, got {headdim}")
        self.theta = nn.Parameter(torch.empty(headdim // 2))
        self.v = nn.Parameter(torch.empty(headdim), requires_grad=learned)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        i = torch.arange(self.theta.numel(), device=self.theta.device, dtype=torch.float64)
        fill_(self.theta, 10000 ** (-i / self.theta.numel()))
        normal_(self.v, 1.0)

    def forward(self, positions: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q and k (..., nheads, headdim), turned by integer positions (...)."""
        u = F.normalize(self.v.to(torch.promote_types(self.theta.dtype, torch.float32)), dim=0)
        a, b = (x.to(u.dtype) - 2 * (x.to(u.dtype) @ u).unsqueeze(-1) * u for x in (q, k))
        a, b = rotate(a, b, self.theta, positions, pairs="neighbours")
        return a.to(q.dtype), b.to(k.dtype)
