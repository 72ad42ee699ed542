"""DeltaNet: a matrix state that is corrected towards each new value, behind a short convolution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from seqlib.errors import ConfigError
from seqlib.layers.ending import NormLinear
from seqlib.layers.init import fill_, linear_
from seqlib.layers.linear import Linear
from seqlib.layers.short_conv import ShortConv
from seqlib.layers.steps import project
from seqlib.mixers.base import MixerConfig, positive, wide, within
from seqlib.mixers.matrix import MatrixMixer, MatrixState, divide
from seqlib.ops import delta_rule
from seqlib.ops.norm import unit_length
from seqlib.sequence import SequenceInfo

__all__ = ["DeltaConfig", "DeltaMixer", "DeltaNet", "DeltaNetConfig"]


@dataclass(frozen=True, kw_only=True)
class DeltaConfig(MixerConfig):
    """What the mixers around the delta rule have in common."""

    nheads: int = 16
    """Heads of queries and keys."""
    nheads_v: int | None = None
    """Heads of values, each group of nheads_v / nheads neighbours sharing a query and key head; None is nheads."""
    headdim: int | None = None
    """Width of each query and key; None is d_model / nheads."""
    expand_v: float = 1.0
    """Width of each value = expand_v * headdim."""
    d_conv: int = 4
    allow_neg_eigval: bool = False
    """beta in (0, 2) instead of (0, 1), so that the state can be reflected."""
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        positive(self, "nheads", "nheads_v", "headdim", "d_conv")
        within(self, 0, 1000, "expand_v")


@dataclass(frozen=True, kw_only=True)
class DeltaNetConfig(DeltaConfig):
    """Hyperparameters of `DeltaNet`; the defaults are those of fla."""

    kind: str = "deltanet"
    gate: bool = False
    """Gate the outputs by silu(g_proj(x))."""


D = TypeVar("D", bound=DeltaConfig)


class DeltaMixer(MatrixMixer[D], Generic[D]):
    """Projections, convolution and norm around `ops.delta_rule`; subclasses add a decay and an output gate.

    Rows of `qkv_proj` and `conv1d` are q, k, v, heads side by side.
    """

    def __init__(self, config: D, d_model: int, **place: Any) -> None:
        super().__init__(config, d_model, **place)
        c = config
        d_state = c.headdim or divide(c.kind, "d_model", d_model, "nheads", c.nheads)
        nheads, headdim = c.nheads_v or c.nheads, int(c.expand_v * d_state)
        divide(c.kind, "nheads_v", nheads, "nheads", c.nheads)
        if headdim < 1:
            raise ConfigError(f"{c.kind}: expand_v * headdim must be at least 1, got {c.expand_v} * {d_state}")
        self.matrix_shape = (nheads, d_state, headdim)
        self.widths = [c.nheads * d_state, c.nheads * d_state, nheads * headdim]
        self.qkv_proj = Linear(d_model, sum(self.widths), bias=False)
        self.conv1d = ShortConv(sum(self.widths), c.d_conv, bias=False)
        self.b_proj = Linear(d_model, nheads, bias=False)
        self.norm_weight = nn.Parameter(torch.empty(headdim))
        self.o_proj = Linear(nheads * headdim, d_model, bias=False)

    def reset_parameters(self) -> None:
        self.conv1d.reset_parameters()
        for layer in (m for m in self.modules() if isinstance(m, Linear)):
            linear_(layer, self.residual_scale if layer is self.o_proj else 1.0)
        fill_(self.norm_weight, 1.0)

    def read(self, x: Tensor) -> tuple[Any, ...]:
        """Four projections of x: what becomes q, k, v; beta; the decay; the output gate. None for what is not there."""
        raise NotImplementedError

    def log_decay(self, a: Any) -> Tensor | None:
        """(..., nheads) or (..., nheads, d_state) from the third of `read`; None for no decay."""
        return None

    def end(self, gate: Any) -> NormLinear:
        """What is done to what is read from the state, from the fourth of `read`."""
        return NormLinear(self.o_proj, self.norm_weight, gate, eps=self.config.norm_eps)

    def forward(
        self, x: Tensor, state: MatrixState | None = None, seq: SequenceInfo | None = None
    ) -> tuple[Tensor, MatrixState]:
        self.check(x, seq)
        before, matrix = (None, None) if state is None else (state.conv, state.state)
        qkv, b, a, gate = self.read(x)
        qkv, conv = self.conv1d(qkv, before, seq)
        y, matrix = delta_rule(
            *self._heads(qkv), self._beta(b), self.log_decay(a), scale=self.matrix_shape[1] ** -0.5,
            initial_state=matrix, seq=seq, backend=self.backend("delta_rule"),
        )  # fmt: skip
        return self.end(gate)(y), MatrixState(matrix, conv)

    def step(self, x: Tensor, state: MatrixState) -> tuple[Tensor, MatrixState]:
        assert state.conv is not None
        qkv, b, a, gate = self.read(x)
        q, k, v = self.conv1d.step(qkv, state.conv).split_with_sizes(self.widths, -1)
        y = self.end(gate).step(
            q, k, v, self.log_decay(a), state.state, beta=self._beta(b), scale=self.matrix_shape[1] ** -0.5, unit=True,
            config=self.config.backend,
        )  # fmt: skip
        return y, state

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        nheads = self.matrix_shape[0]
        q, k, v = qkv.split(self.widths, -1)
        q, k = (unit_length(t.unflatten(-1, (self.config.nheads, -1))) for t in (q, k))
        return q, k, v.unflatten(-1, (nheads, -1))

    def _beta(self, b: Tensor) -> Tensor:
        beta = torch.sigmoid(wide(b))
        return 2 * beta if self.config.allow_neg_eigval else beta


class DeltaNet(DeltaMixer[DeltaNetConfig]):
    """Linear attention with the delta rule.

        q, k, v = silu(causal_conv1d(qkv_proj(x)));  q, k = q / |q|, k / |k| per head;  beta = sigmoid(b_proj(x))
        S_t = S_{t-1} + beta_t k_t^T (v_t - k_t S_{t-1})
        y_t = o_proj(rms_norm(d_state^(-1/2) q_t S_t))          per head; with gate: * silu(g_proj(x))

    Source: Yang et al. 2024 (DeltaNet, arXiv 2406.06484), eq. 5 and section 3.4; details as in fla,
    layers/delta_net.py.
    """

    Config: ClassVar[type[MixerConfig]] = DeltaNetConfig

    def __init__(self, config: DeltaNetConfig, d_model: int, **place: Any) -> None:
        super().__init__(config, d_model, **place)
        self.g_proj = Linear(d_model, self.widths[2], bias=False) if config.gate else None
        self.reset_parameters()

    def read(self, x: Tensor) -> tuple[Any, ...]:
        return project(x, self.qkv_proj, self.b_proj, None, self.g_proj)
