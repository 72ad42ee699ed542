"""S5: one diagonal state space for all channels, started from HiPPO."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from seqlib.errors import ConfigError
from seqlib.layers.hippo import nplr
from seqlib.layers.init import fill_
from seqlib.mixers.base import MixerConfig, positive, wide, wide_complex
from seqlib.mixers.lti import ConvConfig
from seqlib.mixers.mimo import SharedState
from seqlib.ops.ssm_kernel import discretize

__all__ = ["S5", "S5Config"]

C_INITS = ("trunc_standard_normal", "lecun_normal", "complex_normal")


@dataclass(frozen=True, kw_only=True)
class S5Config(ConvConfig):
    """Hyperparameters of `S5`; the defaults are those of lindermanlab/S5 where it has any."""

    kind: str = "s5"
    d_state: int = 256
    """Real states of the layer; they come in conjugate pairs, so half as many complex ones are stored."""
    blocks: int = 1
    """A starts as this many equal HiPPO matrices of size d_state / blocks, which must be even."""
    C_init: str = "trunc_standard_normal"
    """"trunc_standard_normal" and "lecun_normal" draw in the HiPPO basis, "complex_normal" in the eigenbasis."""
    discretization: str = "zoh"
    """"zoh" or "bilinear"."""
    clip_eigs: bool = False
    """Hold Re A at or below -1e-4."""
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    """dt of each state starts log-uniform in [dt_min, dt_max]."""
    rate: float = 1.0
    """Multiplies dt: 2 runs a trained layer on inputs of half the sample rate. `mixer.rate` may be set at any time."""
    output: str = "half_glu1"

    def __post_init__(self) -> None:
        positive(self, "d_state", "blocks")
        if self.d_state % (2 * self.blocks):
            raise ConfigError(f"s5: d_state must be a multiple of 2 blocks = {2 * self.blocks}, got {self.d_state}")
        if self.C_init not in C_INITS:
            raise ConfigError(f"s5: C_init must be one of {', '.join(C_INITS)}, got {self.C_init!r}")
        if self.discretization not in ("zoh", "bilinear"):
            raise ConfigError(f"s5: discretization must be 'zoh' or 'bilinear', got {self.discretization!r}")
        if not 0 < self.dt_min <= self.dt_max:
            raise ConfigError(f"s5: need 0 < dt_min <= dt_max, got {self.dt_min} and {self.dt_max}")
        if not self.rate > 0:
            raise ConfigError(f"s5: rate must be positive, got {self.rate}")


class S5(SharedState[S5Config]):
    """A diagonal state space with many inputs and outputs.

        h' = A h + B x,  y = 2 Re(C h) + D x,  discretised with dt = exp(log_dt), one per state
        out = a * sigmoid(W a + b),  a = gelu(y)

    State: (batch, d_state / 2) complex.

    Source: Smith et al. 2023 (arXiv 2208.04933), section 3; lindermanlab/S5, s5/ssm.py and s5/ssm_init.py.
    """

    Config: ClassVar[type[MixerConfig]] = S5Config

    def __init__(self, config: S5Config, d_model: int, **place: Any) -> None:
        super().__init__(config, d_model, config.d_state // 2, **place)
        self.rate = config.rate
        self.A_real = nn.Parameter(torch.empty(self.states))
        self.A_imag = nn.Parameter(torch.empty(self.states))
        self.log_dt = nn.Parameter(torch.empty(self.states))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        c, n = self.config, self.config.d_state
        start = nplr("legs", n // c.blocks)
        V = torch.block_diag(*[start.V] * c.blocks).to(torch.complex64)  # n n/2
        fill_(self.A_real, start.A.real.repeat(c.blocks))
        fill_(self.A_imag, start.A.imag.repeat(c.blocks))
        low, high = math.log(c.dt_min), math.log(c.dt_max)
        fill_(self.log_dt, torch.rand(self.states).mul(high - low).add(low))
        fill_(self.B, torch.view_as_real(V.mH @ _lecun((n, self.d_model), n).to(V.dtype)))
        directions = self.C.shape[0]
        if c.C_init == "complex_normal":
            C = torch.randn(self.C.shape[:-1], dtype=torch.complex64)
        else:
            fan_in = n if c.C_init == "trunc_standard_normal" else n * self.d_model
            C = torch.view_as_complex(_lecun((directions, self.d_model, n, 2), fan_in)) @ V
        fill_(self.C, torch.view_as_real(C))

    def param_groups(self) -> list[tuple[list[str], dict[str, Any]]]:
        return self.config.kernel_groups("A_real", "A_imag", "log_dt", "B")

    def sources(self) -> Sequence[Tensor]:
        return [self.A_real, self.A_imag, self.log_dt, self.B, self.C]

    def recurrence(self) -> tuple[Tensor, Tensor, Tensor]:
        real = wide(self.A_real)
        A = torch.complex(real.clamp(max=-1e-4) if self.config.clip_eigs else real, wide(self.A_imag))
        dt = wide(self.log_dt).exp() * self.rate
        one = torch.ones_like(A)[None]
        log_decay, gain = (t[0] for t in discretize(A[None], one, dt[None], self.config.discretization))
        dtype = wide_complex(self.D)
        B, C = (torch.view_as_complex(wide(p)) for p in (self.B, self.C))
        return log_decay.exp().to(dtype), gain.to(dtype)[:, None] * B, 2 * C


def _lecun(shape: tuple[int, ...], fan_in: int) -> Tensor:
    """A normal distribution cut at two deviations, of variance 1 / fan_in."""
    deviation = fan_in**-0.5 / 0.87962566  # that of the cut one is smaller
    return nn.init.trunc_normal_(
        torch.empty(shape, dtype=torch.float32), std=deviation, a=-2 * deviation, b=2 * deviation
    )
