"""S4D: a diagonal state space per channel, run as a convolution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from seqlib.errors import ConfigError
from seqlib.layers.hippo import DIAGONAL, diagonal
from seqlib.layers.init import fill_, normal_
from seqlib.layers.lti import Diagonal
from seqlib.mixers.base import MixerConfig, wide, wide_dtype
from seqlib.mixers.lti import SSMConfig, TimeInvariant
from seqlib.ops import ssm_kernel_diag
from seqlib.ops.ssm_kernel import discretize

__all__ = ["S4D", "S4DConfig"]


@dataclass(frozen=True, kw_only=True)
class S4DConfig(SSMConfig):
    """Hyperparameters of `S4D`; the defaults are those of state-spaces/s4 (configs/model/layer/s4d.yaml)."""

    kind: str = "s4d"
    init: str = "legs"
    """Start of A and B: "lin", "inv", "inv2", "quad", "legs" or "real" (see `layers.hippo.diagonal`)."""
    discretization: str = "zoh"
    """"zoh" or "bilinear"."""
    B_clip: float | None = 2.0
    """Bound of the entries of B that "legs" starts from."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init not in DIAGONAL:
            raise ConfigError(f"s4d: init must be one of {', '.join(DIAGONAL)}, got {self.init!r}")
        if self.discretization not in ("zoh", "bilinear"):
            raise ConfigError(f"s4d: discretization must be 'zoh' or 'bilinear', got {self.discretization!r}")


class S4D(TimeInvariant[S4DConfig]):
    """A diagonal state space per channel.

        h' = A h + B x,  y = 2 Re(C h) + D x,  A = -exp(A_log) + i A_imag,  discretised with dt = softplus(inv_dt)
        out = glu(W gelu(y) + b)

    Complex parameters are stored as pairs of reals. With init "real" all of them are real and y = C h + D x.

    Source: Gu et al. 2022 (arXiv 2206.11893); state-spaces/s4, models/s4/s4.py (SSMKernelDiag, S4Block), which stores
    -Im A.
    """

    Config: ClassVar[type[MixerConfig]] = S4DConfig

    def __init__(self, config: S4DConfig, d_model: int, **place: Any) -> None:
        super().__init__(config, d_model, **place)
        self.real = config.init == "real"
        n, parts = (config.d_state, ()) if self.real else (config.d_state // 2, (2,))
        self.A_log = nn.Parameter(torch.empty(config.n_ssm, n))
        self.A_imag = None if self.real else nn.Parameter(torch.empty(config.n_ssm, n))
        self.B = nn.Parameter(torch.empty(config.n_ssm, n, *parts))
        self.C = nn.Parameter(torch.empty(self.directions, d_model, n, *parts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        c = self.config
        A, B = diagonal(c.init, c.d_state, clip=c.B_clip)
        fill_(self.A_log, torch.log(-A.real))
        fill_(self.B, B if self.real else torch.view_as_real(B))
        if self.A_imag is not None:
            fill_(self.A_imag, A.imag)
        normal_(self.C, 1.0 if self.real else 0.5**0.5)  # variance 1

    def param_groups(self) -> list[tuple[list[str], dict[str, Any]]]:
        return self.config.kernel_groups("inv_dt", "A_log", "B", *([] if self.real else ["A_imag"]))

    def sources(self) -> Sequence[Tensor]:
        found = (self.inv_dt, self.A_log, self.A_imag, self.B, self.C)
        return [p for p in found if p is not None]

    def make_kernel(self, length: int) -> Tensor:
        A, B, C = self._A_B_C()
        return ssm_kernel_diag(A, B, C, self.dt(), length, discretization=self.config.discretization)

    def make_system(self) -> Diagonal:
        A, B, C = self._A_B_C()
        log_decay, B_bar = discretize(A, B, self.dt(), self.config.discretization)
        return Diagonal(log_decay, B_bar, C[0], pairs=not self.real)

    def _A_B_C(self) -> tuple[Tensor, Tensor, Tensor]:
        A, B, C = -torch.exp(wide(self.A_log)), wide(self.B), wide(self.C)
        if self.A_imag is not None:
            A = torch.complex(A, wide(self.A_imag))
            B, C = torch.view_as_complex(B), torch.view_as_complex(C)
        return self.shared(A), self.shared(B), C

    def state_shape(self) -> tuple[int, torch.dtype]:
        n, dtype = super().state_shape()
        if not self.real:
            return n, dtype
        # The bilinear decay of a real state may be negative, and its logarithm is complex then.
        return self.config.d_state, dtype if self.config.discretization == "bilinear" else wide_dtype(self.D)
