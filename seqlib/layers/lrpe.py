"""Relative positions for linear attention: features times cosine and sine of a learned angle."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from seqlib.layers.init import fill_

__all__ = ["LRPE"]


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

    def forward(self, positions: Tensor, *heads: Tensor) -> tuple[Tensor, ...]:
        """Each of `heads` (..., nheads, headdim) as (..., nheads, 2 headdim), at integer positions (...)."""
        theta = self.theta if self.theta.dtype == torch.float64 else self.theta.float()
        angle = positions[..., None, None] * theta
        cos, sin = angle.cos(), angle.sin()
        return tuple(torch.cat([x * cos, x * sin], -1).to(x.dtype) for x in heads)
