"""Gated DeltaNet: the delta rule on a state that decays by one value per head and token."""

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
from seqlib.mixers.base import MixerConfig, wide
from seqlib.mixers.deltanet import DeltaConfig, DeltaMixer

__all__ = ["GatedDeltaNet", "GatedDeltaNetConfig"]


@dataclass(frozen=True, kw_only=True)
class GatedDeltaNetConfig(DeltaConfig):
    """Hyperparameters of `GatedDeltaNet`; the defaults are those of fla."""

    kind: str = "gated_deltanet"
    nheads: int = 6
    headdim: int | None = 256
    expand_v: float = 2.0
    gate_activation: str = "silu"
    """"silu" or "sigmoid"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gate_activation not in ("silu", "sigmoid"):
            raise ConfigError(
                f"gated_deltanet: gate_activation must be 'silu' or 'sigmoid', got {self.gate_activation!r}"
            )


class GatedDeltaNet(DeltaMixer[GatedDeltaNetConfig]):
    """The delta rule with a decay.

        q, k, v, beta as in `DeltaNet`;  alpha_t = exp(-exp(A_log) softplus(a_proj(x) + dt_bias))
        S_t = alpha_t S_{t-1} + beta_t k_t^T (v_t - k_t alpha_t S_{t-1})
        y_t = o_proj(rms_norm(d_state^(-1/2) q_t S_t) * act(g_proj(x)))          norm per head

    A_log starts at log U(0, 16), dt_bias at the inverse softplus of log-uniform [1e-3, 0.1].

    Source: Yang, Kautz and Hatamizadeh 2024 (arXiv 2412.06464), eq. 10; details as in fla, layers/gated_deltanet.py,
    and in Qwen3-Next, which interleaves the rows of its projections by key head.
    """

    Config: ClassVar[type[MixerConfig]] = GatedDeltaNetConfig

    def __init__(self, config: GatedDeltaNetConfig, d_model: int, **place: Any) -> None:
        super().__init__(config, d_model, **place)
        nheads = self.matrix_shape[0]
        self.a_proj = Linear(d_model, nheads, bias=False)
        self.g_proj = Linear(d_model, self.widths[2], bias=False)
        self.A_log = nn.Parameter(torch.empty(nheads))
        self.dt_bias = nn.Parameter(torch.empty(nheads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        # A hair above 0, whose logarithm would be no number to learn from.
        fill_(self.A_log, torch.empty_like(self.A_log, dtype=torch.float32).uniform_(1e-4, 16).log())
        dt_bias_(self.dt_bias)

    def param_groups(self) -> list[tuple[list[str], dict[str, Any]]]:
        return [(["A_log", "dt_bias"], {"weight_decay": 0.0})]

    def read(self, x: Tensor) -> tuple[Any, ...]:
        return project(x, self.qkv_proj, self.b_proj, self.a_proj, self.g_proj)

    def log_decay(self, a: Tensor) -> Tensor:
        return -torch.exp(wide(self.A_log)) * F.softplus(a + wide(self.dt_bias))

    def end(self, gate: Tensor) -> NormLinear:
        c = self.config
        return NormLinear(self.o_proj, self.norm_weight, gate, c.gate_activation, eps=c.norm_eps)
