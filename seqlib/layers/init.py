"""Initialisers that never overwrite a parameter that was loaded.

transformers marks loaded tensors with `_is_hf_initialized` and then initialises whatever is missing; these functions
honour the mark, so `reset_parameters` of any module is safe to call at any time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from seqlib.layers.linear import Affine

__all__ = ["dt_bias_", "fill_", "linear_", "normal_", "uniform_"]


def _loaded(tensor: Tensor) -> bool:
    return getattr(tensor, "_is_hf_initialized", False)


@torch.no_grad()
def fill_(tensor: Tensor, value: Tensor | float) -> None:
    """Set every entry to `value`, a number or a tensor that broadcasts."""
    if not _loaded(tensor):
        tensor.copy_(torch.as_tensor(value, dtype=tensor.dtype, device=tensor.device).expand(tensor.shape))


@torch.no_grad()
def uniform_(tensor: Tensor, bound: float) -> None:
    """Draw from U(-bound, bound)."""
    if not _loaded(tensor):
        tensor.uniform_(-bound, bound)


@torch.no_grad()
def normal_(tensor: Tensor, std: float) -> None:
    """Draw from N(0, std^2)."""
    if not _loaded(tensor):
        tensor.normal_(0.0, std)


def linear_(layer: nn.Linear | Affine, scale: float = 1.0) -> None:
    """torch's default for a linear layer, U(-1/sqrt(fan_in), 1/sqrt(fan_in)), its weight multiplied by `scale`."""
    bound = 1 / math.sqrt(layer.in_features)
    uniform_(layer.weight, bound * scale)
    if layer.bias is not None:
        uniform_(layer.bias, bound)


def dt_bias_(tensor: Tensor, low: float = 1e-3, high: float = 1e-1, floor: float = 1e-4) -> None:
    """Such that softplus(tensor) is log-uniform in [low, high] and at least `floor`."""
    u = torch.rand(tensor.shape, device=tensor.device)
    dt = (u * (math.log(high) - math.log(low)) + math.log(low)).exp().clamp(min=floor)
    fill_(tensor, dt + torch.log(-torch.expm1(-dt)))
