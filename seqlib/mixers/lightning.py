"""Lightning attention: linear attention with a constant decay per head, as in TransNormerLLM and MiniMax-01."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqlib.errors import ConfigError
from seqlib.layers.decay import constant, lightning_log_decay
from seqlib.layers.init import fill_, normal_
from seqlib.layers.linear import Linear
from seqlib.layers.lrpe import LRPE
from seqlib.layers.positions import advance, positions
from seqlib.mixers.base import MixerConfig, positive
from seqlib.mixers.matrix import MatrixMixer, MatrixState, divide
from seqlib.ops import linear_attention, rms_norm
from seqlib.ops.linear_attention import step as attention_step
from seqlib.sequence import SequenceInfo

__all__ = ["Lightning", "LightningConfig"]


@dataclass(frozen=True, kw_only=True)
class LightningConfig(MixerConfig):
    """Hyperparameters of `Lightning`; the defaults are those of TransNormerLLM."""

    kind: str = "lightning"
    nheads: int | None = None
    """None is d_model / headdim."""
    headdim: int | None = None
    """None is d_model / nheads, or 128 where that is not given either."""
    variant: str = "transnormer"
    """"transnormer" or "minimax"; they differ in slopes, activations, norm and gate (see `Lightning`)."""
    lrpe: bool = False
    """Relative positions by learned angles; TransNormerLLM has them in its first layer only."""
    norm_eps: float = 1e-6
    bias: bool = False
    init_std: float = 0.02

    def __post_init__(self) -> None:
        positive(self, "nheads", "headdim")
        if self.variant not in ("transnormer", "minimax"):
            raise ConfigError(f"lightning: variant must be 'transnormer' or 'minimax', got {self.variant!r}")


class Lightning(MatrixMixer[LightningConfig]):
    """Lightning attention with an output gate.

        q, k, v, u = qkvu_proj(x)
        transnormer:  q, k = lrpe(silu(q)), lrpe(silu(k));   gate(u) = u;          norm without weights
        minimax:      q, k, v = silu(q), silu(k), silu(v);   gate(u) = sigmoid(u);  norm with weights
        S_t = exp(log_decay) S_{t-1} + k_t^T v_t
        y_t = out_proj(gate(u_t) * rms_norm(q_t S_t))

    The norm is over all heads together, there is no scale, and the decays (`layers.decay.lightning_log_decay`) depend
    on the head and on the layer's place among all layers. All projections start at N(0, init_std^2). State:
    `MatrixState`, of 2 * headdim rows and with a count of tokens under LRPE.

    Source: Qin et al. 2023 (TransNormerLLM, arXiv 2307.14995), section 3, and 2024 (Lightning Attention-2, arXiv
    2401.04658); MiniMax 2025 (arXiv 2501.08313), section 2.2. Rows of `qkvu_proj` are q, k, v, u, heads side by side;
    checkpoints of MiniMax interleave q, k, v by head and keep u apart (`output_gate`).
    """

    Config: ClassVar[type[MixerConfig]] = LightningConfig

    def __init__(
        self, config: LightningConfig, d_model: int, *, layer_index: int = 0, n_layer: int = 1, branches: int = 1
    ) -> None:
        super().__init__(config, d_model, layer_index=layer_index, n_layer=n_layer, branches=branches)
        self.nheads = config.nheads or divide(config.kind, "d_model", d_model, "headdim", config.headdim or 128)
        self.headdim = config.headdim or divide(config.kind, "d_model", d_model, "nheads", self.nheads)
        self.log_decay = lightning_log_decay(self.nheads, layer_index, n_layer, config.variant)
        self.matrix_shape = (self.nheads, self.headdim * (1 + config.lrpe), self.headdim)
        self.counts = config.lrpe
        inner = self.nheads * self.headdim
        self.qkvu_proj = Linear(d_model, 4 * inner, bias=config.bias)
        self.lrpe = LRPE(self.nheads, self.headdim) if config.lrpe else None
        self.norm_weight = nn.Parameter(torch.empty(inner)) if config.variant == "minimax" else None
        self.out_proj = Linear(inner, d_model, bias=config.bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for layer in (self.qkvu_proj, self.out_proj):
            normal_(layer.weight, self.config.init_std)
            if layer.bias is not None:
                fill_(layer.bias, 0.0)
        if self.lrpe is not None:
            self.lrpe.reset_parameters()
        if self.norm_weight is not None:
            fill_(self.norm_weight, 1.0)

    def param_groups(self) -> list[tuple[list[str], dict[str, Any]]]:
        return [] if self.lrpe is None else [(["lrpe.theta"], {"weight_decay": 0.0})]

    def forward(
        self, x: Tensor, state: MatrixState | None = None, seq: SequenceInfo | None = None
    ) -> tuple[Tensor, MatrixState]:
        self.check(x, seq)
        matrix, before = (None, None) if state is None else (state.state, state.length)
        at = None if self.lrpe is None else positions(x, before, seq)
        q, k, v, u = self._heads(x, at)
        y, matrix = linear_attention(
            q, k, v, constant(self.log_decay, x), initial_state=matrix, seq=seq,
            backend=self.backend("linear_attention"),
        )  # fmt: skip
        return self._out(y, u), MatrixState(matrix, length=None if at is None else advance(x, before, seq))

    def step(self, x: Tensor, state: MatrixState) -> tuple[Tensor, MatrixState]:
        q, k, v, u = self._heads(x, state.length)
        y = attention_step(q, k, v, constant(self.log_decay, x), state.state)
        if state.length is not None:
            state.length += 1
        return self._out(y, u), state

    def _heads(self, x: Tensor, at: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v by heads and the gate; x (batch, seqlen, d_model) or (batch, d_model), `at` its positions."""
        minimax = self.config.variant == "minimax"
        q, k, v, u = self.qkvu_proj(x).chunk(4, -1)
        q, k, v = F.silu(q), F.silu(k), F.silu(v) if minimax else v
        q, k, v = (t.unflatten(-1, (-1, self.headdim)) for t in (q, k, v))
        if self.lrpe is not None:
            assert at is not None
            q, k = self.lrpe(at, q, k)
        return q, k, v, torch.sigmoid(u) if minimax else u

    def _out(self, y: Tensor, gate: Tensor) -> Tensor:
        return self.out_proj(gate * rms_norm(y.flatten(-2), self.norm_weight, eps=self.config.norm_eps))
