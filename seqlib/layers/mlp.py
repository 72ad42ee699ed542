"""Channel mixers: what follows the sequence mixer in a block."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from seqlib.errors import ConfigError
from seqlib.layers.init import linear_
from seqlib.layers.linear import Linear
from seqlib.layers.steps import project

__all__ = ["ACTIVATIONS", "MLP", "MLPConfig"]


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _identity(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
    "relu2": _relu2,
    "identity": _identity,
}
"""Functions with names: modules keep them, and are pickled."""


@dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """Width and form of a channel mixer."""

    d_mlp: int | None = None
    """Hidden width; None takes 8/3 * d_model when gated, 4 * d_model otherwise, rounded up to `multiple_of`."""
    gated: bool = True
    """y = down(act(gate(x)) * up(x)) (SwiGLU, and SGLU with activation "identity"); otherwise down(act(up(x)))."""
    activation: str = "silu"
    bias: bool = False
    gate_scale: float = 1.0
    """Factor of gate(x) before the activation."""
    multiple_of: int = 128

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ConfigError(f"mlp activation {self.activation!r} is unknown; known: {', '.join(ACTIVATIONS)}")
        if self.multiple_of < 1 or (self.d_mlp is not None and self.d_mlp < 1):
            raise ConfigError(f"mlp widths must be positive, got d_mlp={self.d_mlp}, multiple_of={self.multiple_of}")

    def width(self, d_model: int) -> int:
        """The hidden width for a model of `d_model`."""
        if self.d_mlp is not None:
            return self.d_mlp
        wanted = -(-8 * d_model // 3) if self.gated else 4 * d_model
        return -(-wanted // self.multiple_of) * self.multiple_of

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return dataclasses.asdict(self)


class MLP(nn.Module):
    """Position-wise gated or plain two-layer network.

    Source: Shazeer 2020 (GLU variants), eq. 6 for the gated form.
    """

    def __init__(self, config: MLPConfig, d_model: int, *, residual_scale: float = 1.0) -> None:
        super().__init__()
        width = config.width(d_model)
        self.activation, self.gate_scale = ACTIVATIONS[config.activation], config.gate_scale
        self.residual_scale = residual_scale
        self.up_proj = Linear(d_model, width, bias=config.bias)
        self.gate_proj = Linear(d_model, width, bias=config.bias) if config.gated else None
        self.down_proj = Linear(width, d_model, bias=config.bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        linear_(self.up_proj)
        if self.gate_proj is not None:
            linear_(self.gate_proj)
        linear_(self.down_proj, self.residual_scale)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(x)))
        gate, up = project(x, self.gate_proj, self.up_proj)
        return self.down_proj(self.activation(gate if self.gate_scale == 1 else gate * self.gate_scale) * up)
