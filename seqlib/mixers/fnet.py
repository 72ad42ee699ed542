"""Mixing without weights: the Fourier transform of FNet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from seqlib.mixers.base import MixerConfig, wide
from seqlib.mixers.whole import WholeMixer

__all__ = ["FNet", "FNetConfig"]


@dataclass(frozen=True, kw_only=True)
class FNetConfig(MixerConfig):
    """Hyperparameters of `FNet`."""

    kind: str = "fnet"
    normalized: bool = True
    """Divide by sqrt(seqlen * d_model), which keeps the size of x. The published one leaves that to a norm after the
    sum, which blocks here do not have."""


class FNet(WholeMixer[FNetConfig]):
    """The real part of the Fourier transform over positions and channels.

        y = Re(FFT_positions(FFT_channels(x)))

    The transform is over the tokens of a document, not over its padding, which published encoders include.

    Source: Lee-Thorp et al. 2021 (arXiv 2105.03824), eq. 3.
    """

    Config: ClassVar[type[MixerConfig]] = FNetConfig

    def reset_parameters(self) -> None:
        """There is nothing to initialise."""

    def mix(self, x: Tensor) -> Tensor:
        norm = "ortho" if self.config.normalized else "backward"
        return torch.fft.fft2(wide(x), dim=(1, 2), norm=norm).real.to(x.dtype) * self.residual_scale
