"""Lightning attention: linear attention with a constant decay per head, as in TransNormerLLM, MiniMax-01, Ring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqlib.errors import ConfigError
from seqlib.layers.decay import constant, lightning_log_decay
from seqlib.layers.ending import NormLinear
from seqlib.layers.init import fill_, normal_
from seqlib.layers.linear import Linear
from seqlib.layers.lrpe import LRPE
from seqlib.layers.norm import RMSNorm
from seqlib.layers.positions import advance, positions
from seqlib.layers.rotary import Rotary
from seqlib.mixers.base import MixerConfig, positive, within
from seqlib.mixers.matrix import MatrixMixer, MatrixState, divide
from seqlib.ops import linear_attention
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
    """"transnormer", "minimax" or "ring"; they differ in slopes, activations, norm and gate (see `Lightning`)."""
    lrpe: bool = False
    """Relative positions by learned angles; TransNormerLLM has them in its first layer only."""
    norm_eps: float = 1e-6
    bias: bool = False
    init_std: float = 0.02
    qk_norm: bool = False
    """ring: RMSNorm of every query and key head."""
    rotary_fraction: float = 0.5
    """ring: part of each query and key head that is rotated."""
    rope_theta: float = 10000.0
    """ring: base of the wavelengths."""
    norm_groups: int = 1
    """ring: parts of all heads together that have a norm of their own."""

    def __post_init__(self) -> None:
        positive(self, "nheads", "headdim", "norm_groups")
        within(self, 0, 1, "init_std", "rotary_fraction")
        if self.variant not in ("transnormer", "minimax", "ring"):
            raise ConfigError(f"lightning: variant must be 'transnormer', 'minimax' or 'ring', got {self.variant!r}")
        foreign = ("lrpe",) if self.variant == "ring" else ("qk_norm", "rotary_fraction", "rope_theta", "norm_groups")
        changed = [name for name in foreign if getattr(self, name) != getattr(LightningConfig, name)]
        if changed:
            raise ConfigError(f"lightning: variant {self.variant!r} has no {', '.join(changed)}; leave it out")


class Lightning(MatrixMixer[LightningConfig]):
    """Lightning attention with an output gate.

        q, k, v, u = qkvu_proj(x)
        transnormer:  q, k = lrpe(silu(q)), lrpe(silu(k));   gate(u) = u;          norm without weights
        minimax:      q, k, v = silu(q), silu(k), silu(v);   gate(u) = sigmoid(u);  norm with weights
        ring:         q, k = rotary(rms_norm(q)) / sqrt(headdim), rotary(rms_norm(k));  gate, norm as minimax, in groups
        S_t = exp(log_decay) S_{t-1} + k_t^T v_t
        y_t = out_proj(gate(u_t) * rms_norm(q_t S_t))

    The norm is over all heads together, there is no other scale, and the decays (`layers.decay.lightning_log_decay`)
    depend on the head and on the layer's place among all layers. All projections start at N(0, init_std^2). State:
    `MatrixState`; under LRPE of 2 * headdim rows, and there and for ring with a count of tokens.

    Source: Qin et al. 2023 (TransNormerLLM, arXiv 2307.14995), section 3, and 2024 (Lightning Attention-2, arXiv
    2401.04658); MiniMax 2025 (arXiv 2501.08313), section 2.2. Rows of `qkvu_proj` are q, k, v, u, heads side by side;
    checkpoints of MiniMax interleave q, k, v by head and keep u apart (`output_gate`). Ring-linear V2: as its serving
    implementation; not compared with a released checkpoint.
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
        ring = config.variant == "ring"
        self.counts = config.lrpe or ring
        self.scale = self.headdim**-0.5 if ring else 1.0
        self.inner = inner = self.nheads * self.headdim
        self.qkvu_proj = Linear(d_model, 4 * inner, bias=config.bias)
        self.lrpe = LRPE(self.nheads, self.headdim) if config.lrpe else None
        self.rotary = Rotary(self.headdim, config.rope_theta, config.rotary_fraction) if ring else None
        self.q_norm = RMSNorm(self.headdim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.headdim, config.norm_eps) if config.qk_norm else None
        self.group_size = divide(config.kind, "nheads * headdim", inner, "norm_groups", config.norm_groups)
        self.norm_weight = None if config.variant == "transnormer" else nn.Parameter(torch.empty(inner))
        self.out_proj = Linear(inner, d_model, bias=config.bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for layer in (self.qkvu_proj, self.out_proj):
            normal_(layer.weight, self.config.init_std)
            if layer.bias is not None:
                fill_(layer.bias, 0.0)
        for part in (self.lrpe, self.q_norm, self.k_norm):
            if part is not None:
                part.reset_parameters()
        if self.norm_weight is not None:
            fill_(self.norm_weight, 1.0)

    def param_groups(self) -> list[tuple[list[str], dict[str, Any]]]:
        return [] if self.lrpe is None else [(["lrpe.theta"], {"weight_decay": 0.0})]

    def forward(
        self, x: Tensor, state: MatrixState | None = None, seq: SequenceInfo | None = None
    ) -> tuple[Tensor, MatrixState]:
        self.check(x, seq)
        matrix, before = (None, None) if state is None else (state.state, state.length)
        at = positions(x, before, seq) if self.counts else None
        q, k, v, u = self._heads(x, at)
        y, matrix = linear_attention(
            q, k, v, constant(self.log_decay, x), scale=self.scale, initial_state=matrix, seq=seq,
            backend=self.backend("linear_attention"),
        )  # fmt: skip
        return self._end(u)(y), MatrixState(matrix, length=None if at is None else advance(x, before, seq))

    def step(self, x: Tensor, state: MatrixState) -> tuple[Tensor, MatrixState]:
        q, k, v, u = self._heads(x, state.length)
        decay, config = constant(self.log_decay, x), self.config.backend
        y = self._end(u).step(q, k, v, decay, state.state, scale=self.scale, config=config)
        if state.length is not None:
            state.length += 1
        return y, state

    def _heads(self, x: Tensor, at: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v by heads and the gate; x (batch, seqlen, d_model) or (batch, d_model), `at` its positions."""
        variant = self.config.variant
        qkv, u = self.qkvu_proj(x).split([3 * self.inner, self.inner], -1)
        if variant == "minimax":
            qkv = F.silu(qkv)
        qk, v = qkv.split([2 * self.inner, self.inner], -1)
        if variant == "transnormer":
            qk = F.silu(qk)
        q, k = qk.unflatten(-1, (2 * self.nheads, -1)).chunk(2, -2)
        v = v.unflatten(-1, (self.nheads, -1))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        for place in (self.lrpe, self.rotary):
            if place is not None:
                assert at is not None
                q, k = place(at, q, k)
        return q, k, v, u

    def _end(self, gate: Tensor) -> NormLinear:
        activation = "none" if self.config.variant == "transnormer" else "sigmoid"
        return NormLinear(self.out_proj, self.norm_weight, gate, activation, self.group_size, self.config.norm_eps)
