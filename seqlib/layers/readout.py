"""What follows the convolution or scan of a state-space layer: an activation and a product that mixes channels."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqlib.context import counted
from seqlib.errors import ConfigError
from seqlib.layers.binding import fusable
from seqlib.layers.init import fill_, linear_
from seqlib.layers.linear import Linear
from seqlib.ops import gelu_glu
from seqlib.ops.linear import FEW_ROWS

__all__ = ["ACTIVATIONS", "OUTPUTS", "Readout"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
    "none": lambda x: x,
}
OUTPUTS = ("glu", "linear", "half_glu1", "half_glu2", "none")


class Readout(nn.Module):
    """Positionwise, from (..., d) to (..., d):

        a = activation(y)
        glu        v * sigmoid(g),  v, g = W a + b     (W: 2d rows)
        linear     W a + b
        half_glu1  a * sigmoid(W a + b)
        half_glu2  y * sigmoid(W a + b)
        none       a

    Args:
        d: width.
        activation: "gelu", "silu", "relu" or "none".
        output: one of the five above.
        scale: factor of the initial weights of what is added to the residual stream.

    Source: Gu et al. 2022 (state-spaces/s4, models/s4/s4.py, S4Block) for glu and linear; Smith et al. 2023
    (lindermanlab/S5, s5/layers.py) for the half gates.
    """

    def __init__(self, d: int, activation: str = "gelu", output: str = "glu", scale: float = 1.0) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ConfigError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if output not in OUTPUTS:
            raise ConfigError(f"output must be one of {', '.join(OUTPUTS)}, got {output!r}")
        self.activation, self.output, self.scale = activation, output, scale
        self.proj = None if output == "none" else Linear(d, 2 * d if output == "glu" else d)

    def reset_parameters(self) -> None:
        if self.proj is None:
            return
        linear_(self.proj, self.scale if self.output == "linear" else 1.0)
        if self.output == "glu":  # the gate keeps its size
            weight = self.proj.weight.detach().clone()
            weight[: self.proj.in_features] *= self.scale
            fill_(self.proj.weight, weight)

    def forward(self, y: Tensor) -> Tensor:
        if self._at_once(y):
            assert self.proj is not None
            return gelu_glu(y, self.proj.weight, self.proj.bias)
        a = ACTIVATIONS[self.activation](y)
        if self.proj is None:
            return a
        mixed = self.proj(a)
        if self.output == "glu":
            return F.glu(mixed, -1)
        if self.output == "linear":
            return mixed
        return (a if self.output == "half_glu1" else y) * torch.sigmoid(mixed)

    def _at_once(self, y: Tensor) -> bool:
        """Whether one op stands for the three parts, and nobody would miss the call of the projection between them."""
        proj = self.proj
        return (
            (self.activation, self.output) == ("gelu", "glu")
            and y.device.type == "cpu"
            and counted(y.numel()) > FEW_ROWS * y.shape[-1]
            and proj is not None
            and fusable(proj)
            and y.dtype == proj.weight.dtype
            and not torch.is_autocast_enabled("cpu")
        )
