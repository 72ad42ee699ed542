"""Retention: linear attention with one constant decay per head and rotary positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from seqlib.layers.decay import constant, retention_log_decay
from seqlib.layers.ending import NormLinear
from seqlib.layers.init import fill_, linear_
from seqlib.layers.linear import Linear
from seqlib.layers.positions import advance, positions
from seqlib.layers.rotary import Rotary
from seqlib.layers.steps import project
from seqlib.mixers.base import MixerConfig, positive, within
from seqlib.mixers.matrix import MatrixMixer, MatrixState, divide
from seqlib.ops import linear_attention
from seqlib.sequence import SequenceInfo

__all__ = ["RetNet", "RetNetConfig"]


@dataclass(frozen=True, kw_only=True)
class RetNetConfig(MixerConfig):
    """Hyperparameters of `RetNet`; the defaults are those of fla."""

    kind: str = "retnet"
    nheads: int = 8
    expand_k: float = 1.0
    """Width of all queries = expand_k * d_model."""
    expand_v: float = 2.0
    """Width of all values = expand_v * d_model."""
    rotary: bool = True
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        positive(self, "nheads")
        within(self, 0, 1000, "expand_k", "expand_v")


class RetNet(MatrixMixer[RetNetConfig]):
    """Multi-scale retention.

        q, k = rotary(q_proj(x)), rotary(k_proj(x));  v = v_proj(x);  g = g_proj(x)
        S_t = gamma_h S_{t-1} + k_t^T v_t,  gamma_h = 1 - 2^(-5-h)
        y_t = o_proj(rms_norm(d_state^(-1/2) q_t S_t) * silu(g_t))            norm per head

    State: `MatrixState` with a count of tokens where there are rotary positions.

    Source: Sun et al. 2023 (RetNet, arXiv 2307.08621), eq. 5-8; names and details as in fla,
    layers/multiscale_retention.py.
    """

    Config: ClassVar[type[MixerConfig]] = RetNetConfig

    def __init__(self, config: RetNetConfig, d_model: int, **place: Any) -> None:
        super().__init__(config, d_model, **place)
        c = config
        d_key, d_value = int(c.expand_k * d_model), int(c.expand_v * d_model)
        d_state = divide(c.kind, "expand_k * d_model", d_key, "nheads", c.nheads)
        headdim = divide(c.kind, "expand_v * d_model", d_value, "nheads", c.nheads)
        self.matrix_shape = (c.nheads, d_state, headdim)
        self.counts = c.rotary
        self.log_decay = retention_log_decay(c.nheads)
        self.q_proj = Linear(d_model, d_key, bias=False)
        self.k_proj = Linear(d_model, d_key, bias=False)
        self.v_proj = Linear(d_model, d_value, bias=False)
        self.g_proj = Linear(d_model, d_value, bias=False)
        self.o_proj = Linear(d_value, d_model, bias=False)
        self.norm_weight = nn.Parameter(torch.empty(headdim))
        self.rotary = Rotary(d_state, c.rope_theta) if c.rotary else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.g_proj):
            linear_(layer)
        linear_(self.o_proj, self.residual_scale)
        fill_(self.norm_weight, 1.0)

    def forward(
        self, x: Tensor, state: MatrixState | None = None, seq: SequenceInfo | None = None
    ) -> tuple[Tensor, MatrixState]:
        self.check(x, seq)
        matrix, before = (None, None) if state is None else (state.state, state.length)
        at = None if self.rotary is None else positions(x, before, seq)
        q, k, v, gate = self._heads(x, at)
        y, matrix = linear_attention(
            q, k, v, constant(self.log_decay, x), scale=self.matrix_shape[1] ** -0.5, initial_state=matrix,
            seq=seq, backend=self.backend("linear_attention"),
        )  # fmt: skip
        return self._end(gate)(y), MatrixState(matrix, length=None if at is None else advance(x, before, seq))

    def step(self, x: Tensor, state: MatrixState) -> tuple[Tensor, MatrixState]:
        decay, scale = constant(self.log_decay, x), self.matrix_shape[1] ** -0.5
        q, k, v, gate = self._heads(x, state.length)
        y = self._end(gate).step(q, k, v, decay, state.state, scale=scale, config=self.config.backend)
        if state.length is not None:
            state.length += 1
        return y, state

    def _heads(self, x: Tensor, at: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v by heads, and the gate; (batch, seqlen, ...) or (batch, ...)."""
        q, k, v, gate = project(x, self.q_proj, self.k_proj, self.v_proj, self.g_proj)
        q, k, v = (t.unflatten(-1, (self.config.nheads, -1)) for t in (q, k, v))
        if self.rotary is not None:
            assert at is not None
            q, k = self.rotary(at, q, k)
        return q, k, v, gate

    def _end(self, gate: Tensor) -> NormLinear:
        return NormLinear(self.o_proj, self.norm_weight, gate, eps=self.config.norm_eps)
