"""Mamba-2: linear attention whose decay, one value per head and token, comes from the step size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqlib.errors import ConfigError
from seqlib.layers.init import dt_bias_, fill_, linear_, uniform_
from seqlib.layers.linear import Linear
from seqlib.layers.norm import RMSNorm
from seqlib.layers.short_conv import ShortConv
from seqlib.mixers.base import MixerConfig, positive, wide
from seqlib.mixers.fused import why_apart
from seqlib.mixers.matrix import MatrixMixer, MatrixState, divide
from seqlib.ops import linear_attention, rms_norm
from seqlib.ops.linear import WIDEST
from seqlib.ops.linear_attention import step as attention_step
from seqlib.sequence import SequenceInfo

__all__ = ["Mamba2", "Mamba2Config"]

_TAPS = 4  # of a convolution in the kernel


@dataclass(frozen=True, kw_only=True)
class Mamba2Config(MixerConfig):
    """Hyperparameters of `Mamba2`; the defaults are those of state-spaces/mamba."""

    kind: str = "mamba2"
    d_state: int = 128
    headdim: int = 64
    ngroups: int = 1
    """Groups of heads that share B and C."""
    d_conv: int = 4
    expand: int = 2
    """d_inner = expand * d_model, unless given."""
    d_inner: int | None = None
    A_min: float = 1.0
    A_max: float = 16.0
    """-A starts uniform in [A_min, A_max]."""
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    """dt starts log-uniform in [dt_min, dt_max]."""
    dt_floor: float = 1e-4
    dt_limit_min: float = 0.0
    dt_limit_max: float | None = None
    """dt is held in [dt_limit_min, dt_limit_max], also while decoding; None is no upper limit."""
    D_per_channel: bool = False
    """One skip weight per channel instead of one per head."""
    norm: bool = True
    """Gated RMSNorm over the groups' channels; False only gates."""
    norm_before_gate: bool = False
    norm_eps: float = 1e-5
    in_scales: tuple[float, ...] | None = None
    """Factors of z, x, B, C and dt as they leave in_proj (Falcon-H1); None is 1."""
    conv_bias: bool = True
    bias: bool = False
    out_bias: bool | None = None
    """Bias of out_proj; None is the same as `bias`."""
    conv_init: float | None = None
    """Bound of the uniform convolution weights; None is 1/sqrt(d_conv)."""

    def __post_init__(self) -> None:
        positive(self, "d_state", "headdim", "ngroups", "d_conv", "expand", "d_inner")
        if not 0 < self.dt_min <= self.dt_max or not 0 < self.A_min <= self.A_max:
            raise ConfigError(
                f"mamba2: need 0 < dt_min <= dt_max and 0 < A_min <= A_max, got {self.dt_min}, {self.dt_max} and "
                f"{self.A_min}, {self.A_max}"
            )
        if self.dt_limit_min < 0 or (self.dt_limit_max is not None and self.dt_limit_max < self.dt_limit_min):
            raise ConfigError(
                f"mamba2: need 0 <= dt_limit_min <= dt_limit_max, got {self.dt_limit_min} and {self.dt_limit_max}"
            )
        if self.in_scales is not None:
            object.__setattr__(self, "in_scales", tuple(self.in_scales))
            if len(self.in_scales) != 5:
                raise ConfigError(f"mamba2: in_scales are factors of z, x, B, C and dt, got {self.in_scales}")


class Mamba2(MatrixMixer[Mamba2Config]):
    """Mamba-2 (state space duality).

        z, x, B, C, dt = in_proj(u);  x, B, C = silu(causal_conv1d(x, B, C))
        delta = clamp(softplus(dt + dt_bias), dt_limit);  A = -exp(A_log), one per head
        S_t = exp(delta_t A) S_{t-1} + B_t^T (delta_t x_t);  y_t = C_t S_t + D x_t
        out = out_proj(rms_norm(y * silu(z)))       norm_before_gate: out_proj(rms_norm(y) * silu(z))

    Rows of `in_proj` are z, x, B, C, dt, those of `conv1d` x, B, C, as in published checkpoints. State: `MatrixState`
    with d_state rows and headdim columns, the transpose of the one in state-spaces/mamba.

    Source: Dao and Gu 2024 (arXiv 2405.21060), section 7; state-spaces/mamba, modules/mamba2.py. Unlike there,
    dt_limit holds in `step` too, so that decoding continues what the prompt began.
    """

    Config: ClassVar[type[MixerConfig]] = Mamba2Config

    def __init__(self, config: Mamba2Config, d_model: int, **place: Any) -> None:
        super().__init__(config, d_model, **place)
        c = config
        self.d_inner = c.d_inner or c.expand * d_model
        self.nheads = divide(c.kind, "d_inner", self.d_inner, "headdim", c.headdim)
        divide(c.kind, "nheads", self.nheads, "ngroups", c.ngroups)
        self.matrix_shape = (self.nheads, c.d_state, c.headdim)
        conv = self.d_inner + 2 * c.ngroups * c.d_state
        self.in_proj = Linear(d_model, self.d_inner + conv + self.nheads, bias=c.bias)
        self.conv1d = ShortConv(conv, c.d_conv, bias=c.conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(self.nheads))
        self.A_log = nn.Parameter(torch.empty(self.nheads))
        self.D = nn.Parameter(torch.empty(self.nheads, c.headdim if c.D_per_channel else 1))
        self.norm_weight = nn.Parameter(torch.empty(self.d_inner)) if c.norm else None
        self.out_proj = Linear(self.d_inner, d_model, bias=c.bias if c.out_bias is None else c.out_bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        c = self.config
        linear_(self.in_proj)
        self.conv1d.reset_parameters()
        if c.conv_init is not None:
            uniform_(self.conv1d.weight, c.conv_init)
        dt_bias_(self.dt_bias, c.dt_min, c.dt_max, c.dt_floor)
        A = torch.rand(self.nheads, device=self.D.device).mul(c.A_max - c.A_min).add(c.A_min)
        fill_(self.A_log, A.log())
        fill_(self.D, 1.0)
        if self.norm_weight is not None:
            fill_(self.norm_weight, 1.0)
        linear_(self.out_proj, self.residual_scale)

    def param_groups(self) -> list[tuple[list[str], dict[str, Any]]]:
        return [(["A_log", "D", "dt_bias"], {"weight_decay": 0.0})]

    def forward(
        self, x: Tensor, state: MatrixState | None = None, seq: SequenceInfo | None = None
    ) -> tuple[Tensor, MatrixState]:
        self.check(x, seq)
        z, x, dt = self._split(self.in_proj(x))
        before, matrix = (None, None) if state is None else (state.conv, state.state)
        x, conv = self.conv1d(x, before, seq)
        x, q, k, v, log_decay = self._heads(x, dt)
        y, matrix = linear_attention(
            q, k, v, log_decay, initial_state=matrix, seq=seq, backend=self.backend("linear_attention")
        )
        return self._out(y, x, z), MatrixState(matrix, conv)

    def step(self, x: Tensor, state: MatrixState) -> tuple[Tensor, MatrixState]:
        assert state.conv is not None
        if self.why_apart(x, state) is None:
            return self._whole_step(x, state), state
        z, x, dt = self._split(self.in_proj(x))
        x, q, k, v, log_decay = self._heads(self.conv1d.step(x, state.conv), dt)
        return self._out(attention_step(q, k, v, log_decay, state.state), x, z), state

    def added_step(self, x: Tensor, norm: nn.Module, state: MatrixState) -> tuple[Tensor, MatrixState]:
        if isinstance(norm, RMSNorm) and self.why_apart(x, state, norm) is None:
            return self._whole_step(x, state, norm), state
        return super().added_step(x, norm, state)

    def why_apart(self, x: Tensor, state: MatrixState, norm: RMSNorm | None = None) -> str | None:
        """Why a step does not run as one native call (on CUDA three kernels), in a sentence; None where it does.

        With `norm`, x is the residual stream and the call also norms it and adds to it.
        """
        c = self.config
        ops = ("linear", "causal_conv1d", "linear_attention") + (("norm",) if norm is not None or c.norm else ())
        if reason := why_apart(self, x, state.state, *ops, device="cuda" if x.is_cuda else "cpu", norm=norm):
            return reason
        assert state.conv is not None
        if state.state.dtype != torch.float32 or not (state.state.is_contiguous() and state.conv.is_contiguous()):
            return "the state is not float32 and contiguous"
        if c.in_scales is not None or c.d_conv > _TAPS or c.headdim % 4 or max(self.d_model, self.d_inner) > WIDEST:
            return f"it has no in_scales, d_conv up to {_TAPS}, headdim in fours and widths up to {WIDEST}"
        if norm is not None and (norm.offset or self.d_model % 4):
            return "its norm has no offset, and d_model is in fours"
        entry, dtype = x if norm is None else norm.weight, self.in_proj.weight.dtype
        same = (entry, self.conv1d.weight, self.norm_weight, self.out_proj.weight, state.conv)
        if any(t is not None and t.dtype != dtype for t in same) or x.dtype not in (dtype, torch.float32):
            return f"not all of x, state and parameters are {dtype}, as in_proj is"
        return None

    def _whole_step(self, x: Tensor, state: MatrixState, norm: RMSNorm | None = None) -> Tensor:
        c, conv, into, out = self.config, self.conv1d, self.in_proj, self.out_proj
        limits = (c.dt_limit_min, math.inf if c.dt_limit_max is None else c.dt_limit_max)
        before = (None, 0.0) if norm is None else (norm.weight, norm.eps)
        return torch.ops.seqlib.mamba2_step.default(
            x, *before, into.weight, into.bias, conv.weight, conv.bias, self.dt_bias, self.A_log, self.D, *limits,
            self.norm_weight, c.norm_eps, c.norm_before_gate, out.weight, out.bias, state.conv, state.state,
        )  # fmt: skip

    def _split(self, projected: Tensor) -> tuple[Tensor, ...]:
        c = self.config
        if c.in_scales is not None:
            width = c.ngroups * c.d_state
            parts = projected.split([self.d_inner, self.d_inner, width, width, self.nheads], -1)
            projected = torch.cat([part * scale for part, scale in zip(parts, c.in_scales)], -1)
        return projected.split([self.d_inner, self.conv1d.weight.shape[0], self.nheads], -1)

    def _heads(self, x: Tensor, dt: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x, q, k, v by heads, and the log-decay; (batch, seqlen, ...) or (batch, ...)."""
        c = self.config
        width = c.ngroups * c.d_state
        x, B, C = x.split([self.d_inner, width, width], -1)
        x, B, C = x.unflatten(-1, (-1, c.headdim)), B.unflatten(-1, (c.ngroups, -1)), C.unflatten(-1, (c.ngroups, -1))
        delta = F.softplus(dt + wide(self.dt_bias))
        if c.dt_limit_min > 0 or c.dt_limit_max is not None:
            delta = delta.clamp(c.dt_limit_min, c.dt_limit_max)
        return x, C, B, (x * delta.unsqueeze(-1)).to(x.dtype), delta * -torch.exp(wide(self.A_log))

    def _out(self, y: Tensor, x: Tensor, z: Tensor) -> Tensor:
        c = self.config
        y = torch.addcmul(y, x, self.D.to(x.dtype)).flatten(-2)
        if self.norm_weight is None:
            return self.out_proj(y * F.silu(z))
        return self.out_proj(
            rms_norm(
                y, self.norm_weight, gate=z, norm_before_gate=c.norm_before_gate, group_size=self.d_inner // c.ngroups,
                eps=c.norm_eps,
            )
        )  # fmt: skip
