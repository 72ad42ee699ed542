"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from seqlib.errors import ConfigError
from seqlib.layers.steps import why_ops_apart
from seqlib.ops.linear import FEW_ROWS

__all__ = ["Rotary"]


class Rotary(nn.Module):
    """Rotate pairs of features by an angle that grows with the position, so that scores see only distances.

        (x_i, x_j) -> (x_i cos a - x_j sin a, x_j cos a + x_i sin a),  a = position / scaling * theta^(-2 i / width)
        width = fraction * headdim;  j = i + width / 2, or i and j are neighbours when interleaved

    There are no buffers, so nothing is lost when a model is built on the meta device. Angles are float32.

    Args:
        headdim: width of a head.
        theta: base of the wavelengths, in tokens.
        fraction: part of the head that is rotated, the rest passes; fraction * headdim must be even.
        interleaved: pair neighbours (GPT-J) instead of the two halves (GPT-NeoX, LLaMA and their checkpoints).
        scaling: stretches positions linearly to reach further than trained; None or 1 for not at all.

    Source: Su et al. 2021 (arXiv 2104.09864), eq. 34; scaling: Chen et al. 2023 (arXiv 2306.15595).
    """

    def __init__(
        self,
        headdim: int,
        theta: float = 10000.0,
        fraction: float = 1.0,
        interleaved: bool = False,
        scaling: float | None = None,
    ) -> None:
        super().__init__()
        self.width = round(headdim * fraction)
        if not 0 < self.width <= headdim or self.width % 2:
            raise ConfigError(
                f"rotary: fraction * headdim must be even, at least 2 and at most headdim, got {fraction} * {headdim}"
            )
        if theta <= 0 or (scaling is not None and scaling <= 0):
            raise ConfigError(f"rotary: theta and scaling must be positive, got {theta} and {scaling}")
        self.theta, self.interleaved, self.scaling = theta, interleaved, scaling or 1.0
        self._frequencies: dict[torch.device, Tensor] = {}

    def forward(self, positions: Tensor, *heads: Tensor) -> tuple[Tensor, ...]:
        """Rotate each of `heads` (batch, seqlen, nheads, headdim) by integer positions (batch or 1, seqlen).

        For one token per row: (batch, nheads, headdim) by (batch,).
        """
        frequency = self._frequency(positions.device)
        few = positions.numel() <= FEW_ROWS and positions.dtype == torch.int64
        if few and all(x.shape[:-2] == positions.shape for x in heads) and why_ops_apart(heads[0], "rotary") is None:
            at = positions.contiguous()
            return tuple(torch.ops.seqlib.rotary_step.default(heads, at, frequency, self.interleaved))
        angle = positions[..., None, None] * frequency
        cos, sin = angle.cos(), angle.sin()
        return tuple(self._rotate(x, cos, sin) for x in heads)

    def _frequency(self, device: torch.device) -> Tensor:
        if torch.compiler.is_compiling():  # a traced tensor must not stay behind
            return self._make_frequency(device)
        if device not in self._frequencies:
            self._frequencies[device] = self._make_frequency(device)
        return self._frequencies[device]

    def _make_frequency(self, device: torch.device) -> Tensor:
        exponent = torch.arange(0, self.width, 2, device=device, dtype=torch.float32) / self.width
        return 1 / (self.scaling * self.theta**exponent)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned = x[..., : self.width]
        a, b = (turned[..., ::2], turned[..., 1::2]) if self.interleaved else turned.chunk(2, -1)
        pair = (a * cos - b * sin, b * cos + a * sin)
        turned = torch.stack(pair, -1).flatten(-2) if self.interleaved else torch.cat(pair, -1)
        return torch.cat([turned.to(x.dtype), x[..., self.width :]], -1)

    def extra_repr(self) -> str:
        return f"width={self.width}, theta={self.theta}, interleaved={self.interleaved}, scaling={self.scaling}"
