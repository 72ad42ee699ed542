"""DSS: a diagonal state space per channel without conjugate pairs, over one shared spectrum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from seqlib.errors import ConfigError
from seqlib.layers.hippo import nplr
from seqlib.layers.init import fill_, normal_
from seqlib.layers.lti import Diagonal
from seqlib.mixers.base import MixerConfig, positive, wide, wide_complex, wide_dtype
from seqlib.mixers.lti import SSMConfig, TimeInvariant
from seqlib.ops import ssm_kernel_diag

__all__ = ["DSS", "DSSConfig"]


@dataclass(frozen=True, kw_only=True)
class DSSConfig(SSMConfig):
    """Hyperparameters of `DSS`. `d_state` counts complex states here: there are no conjugate pairs."""

    kind: str = "dss"
    pairs: ClassVar[bool] = False
    version: str = "exp"
    """"exp", or "softmax": each mode is divided by its sum over `l_max` positions."""
    l_max: int = 1024
    """Positions of the softmax: the length of the sequences to train on."""
    dt_transform: str = "exp"

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "l_max")
        if self.version not in ("exp", "softmax"):
            raise ConfigError(f"dss: version must be 'exp' or 'softmax', got {self.version!r}")


class DSS(TimeInvariant[DSSConfig]):
    """A diagonal state space per channel; the spectrum A is shared, its real and imaginary parts have their own dt.

        exp      kernel[l] = Re sum_n C_n (e^z_n - 1) / A_n  e^(l z_n),  z = dt_0 Re A + i dt_1 Im A
        softmax  the same with C_n / (e^(l_max z_n) - 1)
        y = readout(conv(x, kernel) + D x),  A = -exp(A_log) + i A_imag

    Differences from the source: Re A is negative in both versions, and the softmax is always over l_max positions
    instead of those of the batch, so that the layer is a recurrence.

    Source: Gupta et al. 2022 (arXiv 2203.14343), proposition 1; ag1988/dss, src/models/sequence/ss/standalone/dss.py.
    """

    Config: ClassVar[type[MixerConfig]] = DSSConfig

    def __init__(self, config: DSSConfig, d_model: int, **place: Any) -> None:
        super().__init__(config, d_model, **place)
        n = config.d_state
        self.inv_dt = nn.Parameter(torch.empty(d_model, 2))
        self.A_log = nn.Parameter(torch.empty(config.n_ssm, n))
        self.A_imag = nn.Parameter(torch.empty(config.n_ssm, n))
        self.C = nn.Parameter(torch.empty(self.directions, d_model, n, 2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        A = nplr("legs", 2 * self.config.d_state).A
        fill_(self.A_log, torch.log(-A.real))
        fill_(self.A_imag, -A.imag)
        normal_(self.C, 1.0)

    def param_groups(self) -> list[tuple[list[str], dict[str, Any]]]:
        return self.config.kernel_groups("inv_dt", "A_log", "A_imag", "C")

    def sources(self) -> Sequence[Tensor]:
        return [self.inv_dt, self.A_log, self.A_imag, self.C]

    def make_kernel(self, length: int) -> Tensor:
        system = self.make_system()
        C = torch.view_as_complex(wide(self.C)) / 2  # the kernel op takes states for pairs
        one = torch.ones(self.d_model, dtype=wide_dtype(self.D), device=self.D.device)
        return ssm_kernel_diag(system.log_decay, system.B_bar, C, one, length, discretization="dirac")

    def make_system(self) -> Diagonal:
        real, imag = (self.shared(p.double()) for p in (-torch.exp(wide(self.A_log)), wide(self.A_imag)))
        dt = self.dt().double()
        z = torch.complex(dt[:, :1] * real, dt[:, 1:] * imag)
        inverse = 1 / torch.complex(real, imag)
        if self.config.version == "softmax":
            sums = torch.expm1(self.config.l_max * z) / inverse
            # The source adds this much, lest a slow mode that has turned full circle divides by nothing.
            inverse = sums.conj() / (sums.abs().square() + 1e-7)
        return Diagonal(z, torch.expm1(z) * inverse, torch.view_as_complex(wide(self.C))[0], pairs=False)

    def state_shape(self) -> tuple[int, torch.dtype]:
        return self.config.d_state, wide_complex(self.D)
