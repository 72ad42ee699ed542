"""Mamba: a selective state space between two projections."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from seqlib.errors import ConfigError
from seqlib.layers.init import dt_bias_, fill_, linear_, uniform_
from seqlib.layers.kept import Kept
from seqlib.layers.linear import Linear
from seqlib.layers.short_conv import ShortConv
from seqlib.mixers.base import Mixer, MixerConfig, positive, wide, wide_dtype
from seqlib.mixers.fused import why_apart
from seqlib.ops import rms_norm, selective_scan
from seqlib.ops.selective_scan import step as scan_step
from seqlib.sequence import SequenceInfo, State

__all__ = ["Mamba", "MambaConfig", "MambaState"]


@dataclass(frozen=True, kw_only=True)
class MambaConfig(MixerConfig):
    """Hyperparameters of `Mamba`; the defaults are those of state-spaces/mamba."""

    kind: str = "mamba"
    d_state: int = 16
    """States per channel."""
    d_conv: int = 4
    expand: int = 2
    """d_inner = expand * d_model."""
    dt_rank: int | None = None
    """Width of the bottleneck that makes dt; None is ceil(d_model / 16)."""
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    """dt starts log-uniform in [dt_min, dt_max]."""
    dt_floor: float = 1e-4
    dt_scale: float = 1.0
    dt_init: str = "random"
    """How dt_proj starts: "random" U(-b, b) or "constant" b, with b = dt_scale / sqrt(dt_rank)."""
    conv_bias: bool = True
    bias: bool = False
    inner_norm: str = "none"
    """RMSNorm on dt (before dt_proj), B and C: "none", "plain" (Falcon-Mamba, no weights) or "learned" (Jamba)."""
    inner_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        positive(self, "d_state", "d_conv", "expand", "dt_rank")
        if not 0 < self.dt_min <= self.dt_max:
            raise ConfigError(f"mamba: need 0 < dt_min <= dt_max, got {self.dt_min} and {self.dt_max}")
        if self.dt_init not in ("random", "constant"):
            raise ConfigError(f"mamba: dt_init must be 'random' or 'constant', got {self.dt_init!r}")
        if self.inner_norm not in ("none", "plain", "learned"):
            raise ConfigError(f"mamba: inner_norm must be 'none', 'plain' or 'learned', got {self.inner_norm!r}")


@dataclass
class MambaState(State):
    """conv: (batch, d_conv - 1, d_inner), the last inputs; ssm: (batch, d_inner, d_state), float32."""

    conv: Tensor
    ssm: Tensor


class Mamba(Mixer[MambaConfig]):
    """Mamba-1.

        x, z = in_proj(u);  x = silu(causal_conv1d(x));  dt, B, C = x_proj(x);  dt = dt_proj(dt)
        h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t,  delta = softplus(dt + dt_bias),  A = -exp(A_log)
        y = out_proj((C_t h_t + D x_t) * silu(z_t))

    `dt_proj.bias` of published checkpoints is `dt_bias` here, because it belongs to the scan.

    Source: Gu and Dao 2023 (arXiv 2312.00752), algorithm 2; state-spaces/mamba, modules/mamba_simple.py.
    """

    Config: ClassVar[type[MixerConfig]] = MambaConfig

    def __init__(self, config: MambaConfig, d_model: int, **place: Any) -> None:
        super().__init__(config, d_model, **place)
        self.d_inner = config.expand * d_model
        self.dt_rank = config.dt_rank or math.ceil(d_model / 16)
        n = config.d_state
        self.in_proj = Linear(d_model, 2 * self.d_inner, bias=config.bias)
        self.conv1d = ShortConv(self.d_inner, config.d_conv, bias=config.conv_bias)
        self.x_proj = Linear(self.d_inner, self.dt_rank + 2 * n, bias=False)
        self.dt_proj = Linear(self.dt_rank, self.d_inner, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(self.d_inner))
        self.A_log = nn.Parameter(torch.empty(self.d_inner, n))
        self.D = nn.Parameter(torch.empty(self.d_inner))
        self.out_proj = Linear(self.d_inner, d_model, bias=config.bias)
        if config.inner_norm == "learned":
            self.dt_norm = nn.Parameter(torch.empty(self.dt_rank))
            self.B_norm = nn.Parameter(torch.empty(n))
            self.C_norm = nn.Parameter(torch.empty(n))
        self._kept = Kept()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        c = self.config
        linear_(self.in_proj)
        self.conv1d.reset_parameters()
        linear_(self.x_proj)
        bound = c.dt_scale * self.dt_rank**-0.5
        uniform_(self.dt_proj.weight, bound) if c.dt_init == "random" else fill_(self.dt_proj.weight, bound)
        dt_bias_(self.dt_bias, c.dt_min, c.dt_max, c.dt_floor)
        fill_(self.A_log, torch.arange(1, c.d_state + 1, device=self.A_log.device, dtype=torch.float32).log())
        fill_(self.D, 1.0)
        linear_(self.out_proj, self.residual_scale)
        if c.inner_norm == "learned":
            for weight in (self.dt_norm, self.B_norm, self.C_norm):
                fill_(weight, 1.0)

    def param_groups(self) -> list[tuple[list[str], dict[str, Any]]]:
        return [(["A_log", "D", "dt_bias"], {"weight_decay": 0.0})]

    def forward(
        self, x: Tensor, state: MambaState | None = None, seq: SequenceInfo | None = None
    ) -> tuple[Tensor, MambaState]:
        self.check(x, seq)
        x, z = self.in_proj(x).chunk(2, -1)
        before, ssm = (None, None) if state is None else (state.conv, state.ssm)
        x, conv = self.conv1d(x, before, seq)
        dt, B, C = self._dt_B_C(x)
        y, ssm = selective_scan(
            x, dt, self._A(), B, C, D=wide(self.D), z=z, dt_bias=wide(self.dt_bias), dt_softplus=True,
            initial_state=ssm, seq=seq, backend=self.backend("selective_scan"),
        )  # fmt: skip
        return self.out_proj(y), MambaState(conv, ssm)

    def step(self, x: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        ops = ("linear", "causal_conv1d", "selective_scan")
        if self.config.inner_norm == "none" and why_apart(self, x, state.ssm, *ops) is None:
            return self._whole_step(x, state), state
        x, z = self.in_proj(x).chunk(2, -1)
        x = self.conv1d.step(x, state.conv)
        dt, B, C = self._dt_B_C(x)
        y = scan_step(
            x, dt, self._A_kept(), B, C, state.ssm, D=wide(self.D), z=z, dt_bias=wide(self.dt_bias), dt_softplus=True
        )
        return self.out_proj(y), state

    def _whole_step(self, x: Tensor, state: MambaState) -> Tensor:
        conv, into, out = self.conv1d, self.in_proj, self.out_proj
        return torch.ops.seqlib.mamba_step.default(
            x, into.weight, into.bias, conv.weight, conv.bias, self.x_proj.weight, self.dt_proj.weight, self.dt_bias,
            self._A_kept(), self.D, out.weight, out.bias, state.conv, state.ssm,
        )  # fmt: skip

    def _A(self) -> Tensor:
        return -torch.exp(wide(self.A_log))

    def _A_kept(self) -> Tensor:
        """`_A` without gradient, computed again only when A_log has changed."""
        return self._kept("A", None, (self.A_log,), self._A)

    def _dt_B_C(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c = self.config
        dt, B, C = self.x_proj(x).split([self.dt_rank, c.d_state, c.d_state], -1)
        if c.inner_norm != "none":
            weights = (self.dt_norm, self.B_norm, self.C_norm) if c.inner_norm == "learned" else (None,) * 3
            dt, B, C = (rms_norm(t, w, eps=c.inner_norm_eps) for t, w in zip((dt, B, C), weights))
        return self.dt_proj(dt), B, C

    def initial_state(
        self,
        batch: int,
        max_seqlen: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> MambaState:
        device = device or self.D.device
        ssm = torch.zeros(batch, self.d_inner, self.config.d_state, device=device)
        return MambaState(self.conv1d.initial_state(batch, device, dtype), ssm.to(wide_dtype(self.A_log)))

    def state_bytes(self, batch: int, seqlen: int) -> int:
        c = self.config
        conv = (c.d_conv - 1) * self.conv1d.weight.element_size()
        return batch * self.d_inner * (conv + c.d_state * wide_dtype(self.A_log).itemsize)
