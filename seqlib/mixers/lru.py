"""LRU: a linear recurrent unit with complex diagonal decays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from seqlib.errors import ConfigError
from seqlib.layers.init import fill_, normal_
from seqlib.mixers.base import MixerConfig, positive, wide
from seqlib.mixers.lti import ConvConfig
from seqlib.mixers.mimo import SharedState

__all__ = ["LRU", "LRUConfig"]


@dataclass(frozen=True, kw_only=True)
class LRUConfig(ConvConfig):
    """Hyperparameters of `LRU`; the defaults are those of the paper."""

    kind: str = "lru"
    d_state: int | None = None
    """Complex states; None is d_model."""
    r_min: float = 0.0
    r_max: float = 1.0
    """Decays start uniform in the ring r_min <= |decay| <= r_max."""
    max_phase: float = 2 * math.pi
    """Their angles start uniform in [0, max_phase]."""

    def __post_init__(self) -> None:
        positive(self, "d_state")
        if not 0 <= self.r_min < self.r_max <= 1:
            raise ConfigError(f"lru: need 0 <= r_min < r_max <= 1, got {self.r_min} and {self.r_max}")
        if not 0 < self.max_phase <= 2 * math.pi:
            raise ConfigError(f"lru: max_phase must be in (0, 2 pi], got {self.max_phase}")


class LRU(SharedState[LRUConfig]):
    """A linear recurrent unit.

        h_t = decay h_{t-1} + gamma B x_t,  y = Re(C h) + D x,  out = glu(W gelu(y) + b)
        decay = exp(-exp(nu_log) + i exp(theta_log)),  gamma = exp(gamma_log), at the start sqrt(1 - |decay|^2)

    State: (batch, d_state) complex.

    Source: Orvieto et al. 2023 (arXiv 2303.06349), section 3 and appendix A; NicolasZucchet/minimal-LRU for the scales
    of B, C and D.
    """

    Config: ClassVar[type[MixerConfig]] = LRUConfig

    def __init__(self, config: LRUConfig, d_model: int, **place: Any) -> None:
        super().__init__(config, d_model, config.d_state or d_model, **place)
        self.nu_log = nn.Parameter(torch.empty(self.states))
        self.theta_log = nn.Parameter(torch.empty(self.states))
        self.gamma_log = nn.Parameter(torch.empty(self.states))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        c = self.config
        u, v = torch.rand(2, self.states, device=self.D.device).clamp(min=1e-6)
        square = u * (c.r_max**2 - c.r_min**2) + c.r_min**2  # |decay|^2
        fill_(self.nu_log, torch.log(-0.5 * torch.log(square)))
        fill_(self.theta_log, torch.log(c.max_phase * v))
        fill_(self.gamma_log, 0.5 * torch.log1p(-torch.exp(-2 * torch.exp(self.nu_log.detach().float()))))
        normal_(self.B, (2 * self.d_model) ** -0.5)
        normal_(self.C, self.states**-0.5)

    def param_groups(self) -> list[tuple[list[str], dict[str, Any]]]:
        return self.config.kernel_groups("nu_log", "theta_log", "gamma_log", "B")

    def sources(self) -> Sequence[Tensor]:
        return [self.nu_log, self.theta_log, self.gamma_log, self.B, self.C]

    def recurrence(self) -> tuple[Tensor, Tensor, Tensor]:
        decay = torch.exp(torch.complex(-torch.exp(wide(self.nu_log)), torch.exp(wide(self.theta_log))))
        B, C = (torch.view_as_complex(wide(p)) for p in (self.B, self.C))
        return decay, torch.exp(wide(self.gamma_log))[:, None] * B, C
