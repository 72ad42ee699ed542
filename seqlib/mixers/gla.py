"""Gated linear attention: a decay per key channel and token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqlib.errors import ConfigError
from seqlib.layers.ending import NormLinear
from seqlib.layers.init import fill_, linear_
from seqlib.layers.linear import Linear
from seqlib.layers.steps import project
from seqlib.mixers.base import MixerConfig, positive, wide, within
from seqlib.mixers.matrix import MatrixMixer, MatrixState, divide
from seqlib.ops import linear_attention
from seqlib.sequence import SequenceInfo

__all__ = ["GLA", "GLAConfig"]


@dataclass(frozen=True, kw_only=True)
class GLAConfig(MixerConfig):
    """Hyperparameters of `GLA`; the defaults are those of fla."""

    kind: str = "gla"
    nheads: int = 4
    expand_k: float = 0.5
    """Width of all queries = expand_k * d_model."""
    expand_v: float = 1.0
    """Width of all values = expand_v * d_model."""
    gate_rank: int = 16
    """Width of the bottleneck that makes the decay."""
    gate_normalizer: float = 16.0
    """Divides the log-decay; larger remembers longer."""
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        positive(self, "nheads", "gate_rank")
        within(self, 0, 1000, "expand_k", "expand_v")
        if self.gate_normalizer <= 0:
            raise ConfigError(f"gla: gate_normalizer must be positive, got {self.gate_normalizer}")


class GLA(MatrixMixer[GLAConfig]):
    """Gated linear attention.

        q, k, v, g = q_proj(x), k_proj(x), v_proj(x), g_proj(x)
        alpha_t = sigmoid(gk_b_proj(gk_a_proj(x)))^(1 / gate_normalizer)
        S_t = diag(alpha_t) S_{t-1} + k_t^T v_t
        y_t = o_proj(rms_norm(d_state^(-1/2) q_t S_t) * silu(g_t))             norm per head

    State: `MatrixState`.

    Source: Yang et al. 2024 (GLA, arXiv 2312.06635), section 4.4; details as in fla, layers/gla.py, whose `gk_proj.0`
    and `gk_proj.1` are `gk_a_proj` and `gk_b_proj` here.
    """

    Config: ClassVar[type[MixerConfig]] = GLAConfig

    def __init__(self, config: GLAConfig, d_model: int, **place: Any) -> None:
        super().__init__(config, d_model, **place)
        c = config
        d_key, d_value = int(c.expand_k * d_model), int(c.expand_v * d_model)
        d_state = divide(c.kind, "expand_k * d_model", d_key, "nheads", c.nheads)
        headdim = divide(c.kind, "expand_v * d_model", d_value, "nheads", c.nheads)
        self.matrix_shape = (c.nheads, d_state, headdim)
        self.q_proj = Linear(d_model, d_key, bias=False)
        self.k_proj = Linear(d_model, d_key, bias=False)
        self.v_proj = Linear(d_model, d_value, bias=False)
        self.g_proj = Linear(d_model, d_value, bias=False)
        self.gk_a_proj = Linear(d_model, c.gate_rank, bias=False)
        self.gk_b_proj = Linear(c.gate_rank, d_key, bias=True)
        self.o_proj = Linear(d_value, d_model, bias=False)
        self.norm_weight = nn.Parameter(torch.empty(headdim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.g_proj, self.gk_a_proj, self.gk_b_proj):
            linear_(layer)
        linear_(self.o_proj, self.residual_scale)
        fill_(self.norm_weight, 1.0)

    def forward(
        self, x: Tensor, state: MatrixState | None = None, seq: SequenceInfo | None = None
    ) -> tuple[Tensor, MatrixState]:
        self.check(x, seq)
        *flat, gate = self._read(x)
        q, k, v, log_decay = (t.unflatten(-1, (self.config.nheads, -1)) for t in flat)
        y, matrix = linear_attention(
            q, k, v, log_decay, scale=self.matrix_shape[1] ** -0.5,
            initial_state=None if state is None else state.state, seq=seq, backend=self.backend("linear_attention"),
        )  # fmt: skip
        return self._end(gate)(y), MatrixState(matrix)

    def step(self, x: Tensor, state: MatrixState) -> tuple[Tensor, MatrixState]:
        q, k, v, log_decay, gate = self._read(x)
        scale = self.matrix_shape[1] ** -0.5
        return self._end(gate).step(q, k, v, log_decay, state.state, scale=scale, config=self.config.backend), state

    def _read(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q, k, v, the log-decay and the gate, heads side by side."""
        c = self.config
        q, k, v, gate, low = project(x, self.q_proj, self.k_proj, self.v_proj, self.g_proj, self.gk_a_proj)
        log_decay = F.logsigmoid(wide(self.gk_b_proj(low))) / c.gate_normalizer
        return q, k, v, log_decay, gate

    def _end(self, gate: Tensor) -> NormLinear:
        return NormLinear(self.o_proj, self.norm_weight, gate, eps=self.config.norm_eps)
