"""Kimi delta attention: the delta rule on a state that decays by one value per key channel and token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqlib.errors import ConfigError
from seqlib.layers.ending import NormLinear
from seqlib.layers.init import dt_bias_, fill_
from seqlib.layers.linear import Linear
from seqlib.layers.steps import project
from seqlib.mixers.base import MixerConfig, positive, wide
from seqlib.mixers.deltanet import DeltaConfig, DeltaMixer

__all__ = ["KDA", "KDAConfig"]


@dataclass(frozen=True, kw_only=True)
class KDAConfig(DeltaConfig):
    """Hyperparameters of `KDA`; the defaults are those of fla."""

    kind: str = "kda"
    headdim: int | None = 128
    gate_rank: int | None = None
    """Width of the bottlenecks of the decay and of the output gate; None is the width of a value head."""
    lower_bound: float | None = None
    """Smallest log-decay, negative: log_decay = lower_bound * sigmoid(exp(A_log) (f + dt_bias)). None for none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "gate_rank")
        if self.nheads_v not in (None, self.nheads):
            raise ConfigError(f"kda: decays belong to key heads, so nheads_v must be nheads, got {self.nheads_v}")
        if self.lower_bound is not None and self.lower_bound >= 0:
            raise ConfigError(f"kda: lower_bound is a log-decay and must be negative or None, got {self.lower_bound}")


class KDA(DeltaMixer[KDAConfig]):
    """The delta rule with a decay per key channel.

        q, k, v, beta as in `DeltaNet`;  log alpha_t = -exp(A_log) softplus(f_b_proj(f_a_proj(x)) + dt_bias)
        S_t = (I - beta_t k_t^T k_t) diag(alpha_t) S_{t-1} + beta_t k_t^T v_t
        y_t = o_proj(rms_norm(d_state^(-1/2) q_t S_t) * sigmoid(g_b_proj(g_a_proj(x))))       norm per head

    A_log, one per head, starts at log U(1, 16); dt_bias, one per channel, as in Mamba.

    Source: Kimi Team 2025 (Kimi Linear, arXiv 2510.26692), eq. 1 and section 3; names as in its checkpoints, where
    the three convolutions are apart.
    """

    Config: ClassVar[type[MixerConfig]] = KDAConfig

    def __init__(self, config: KDAConfig, d_model: int, **place: Any) -> None:
        super().__init__(config, d_model, **place)
        nheads, d_state, headdim = self.matrix_shape
        rank = config.gate_rank or headdim
        self.f_a_proj = Linear(d_model, rank, bias=False)
        self.f_b_proj = Linear(rank, nheads * d_state, bias=False)
        self.g_a_proj = Linear(d_model, rank, bias=False)
        self.g_b_proj = Linear(rank, nheads * headdim, bias=False)
        self.A_log = nn.Parameter(torch.empty(nheads))
        self.dt_bias = nn.Parameter(torch.empty(nheads * d_state))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        fill_(self.A_log, torch.empty_like(self.A_log, dtype=torch.float32).uniform_(1, 16).log())
        dt_bias_(self.dt_bias)

    def param_groups(self) -> list[tuple[list[str], dict[str, Any]]]:
        return [(["A_log", "dt_bias"], {"weight_decay": 0.0})]

    def read(self, x: Tensor) -> tuple[Any, ...]:
        return project(x, self.qkv_proj, self.b_proj, self.f_a_proj, self.g_a_proj)

    def log_decay(self, a: Tensor) -> Tensor:
        rate = torch.exp(wide(self.A_log)).unsqueeze(-1)
        f = (self.f_b_proj(a) + wide(self.dt_bias)).unflatten(-1, (self.config.nheads, -1))
        if self.config.lower_bound is not None:
            return self.config.lower_bound * torch.sigmoid(rate * f)
        return -rate * F.softplus(f)

    def end(self, gate: Tensor) -> NormLinear:
        gate = self.g_b_proj(gate)
        return NormLinear(self.o_proj, self.norm_weight, gate, "sigmoid", eps=self.config.norm_eps)
