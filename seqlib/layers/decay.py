"""Constant log-decays per head, exactly as the released models have them."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from seqlib.errors import ConfigError

__all__ = ["alibi_slopes", "constant", "lightning_log_decay", "retention_log_decay"]


def alibi_slopes(nheads: int) -> list[float]:
    """2^(-8 (h+1) / nheads) for a power of two; otherwise those of the power P below it, then every second one of 2P.

    >>> alibi_slopes(4)
    [0.25, 0.0625, 0.015625, 0.00390625]

    Source: Press et al. 2022 (ALiBi, arXiv 2108.12409), section 3, and its released code for other numbers of heads.
    """
    if nheads < 1:
        raise ConfigError(f"nheads must be a positive integer, got {nheads}")
    if nheads & (nheads - 1) == 0:
        return [2.0 ** (-8 * (h + 1) / nheads) for h in range(nheads)]
    below = 1 << (nheads.bit_length() - 1)
    return alibi_slopes(below) + alibi_slopes(2 * below)[::2][: nheads - below]


def lightning_log_decay(nheads: int, layer_index: int, n_layer: int, variant: str = "transnormer") -> tuple[float, ...]:
    """Log-decay of each head of lightning attention in layer l of L: minus slope times a factor that falls with depth.

        transnormer  alibi slopes,        1 - l / (L - 1) + 1e-5          factor 1 + 1e-5 when L = 1
        ring         as transnormer, as a serving implementation has it; the released models' own l is not verified
        minimax      2^(-8 (h+1) / H),    1 - l / (L - 1 + 1e-5) + 1e-5

    The last layer all but remembers everything. The schedule of the paper, (8h/H)(1 - l/L), is that of no released
    model.

    Raises:
        ConfigError: layer_index is not one of 0 .. n_layer - 1, or the variant is unknown.

    Source: OpenNLPLab/TransNormerLLM, modeling_transnormer.py; transformers, models/minimax/modular_minimax.py.
    """
    if not 0 <= layer_index < n_layer:
        raise ConfigError(f"lightning: layer_index must be in 0 .. n_layer - 1 = {n_layer - 1}, got {layer_index}")
    if variant in ("transnormer", "ring"):
        slopes, depth = alibi_slopes(nheads), float(max(n_layer - 1, 1))
    elif variant == "minimax":
        slopes, depth = [2.0 ** (-8 * (h + 1) / nheads) for h in range(nheads)], n_layer - 1 + 1e-5
    else:
        raise ConfigError(f"lightning: variant must be 'transnormer', 'minimax' or 'ring', got {variant!r}")
    return tuple(-slope * (1 - layer_index / depth + 1e-5) for slope in slopes)


def retention_log_decay(nheads: int) -> tuple[float, ...]:
    """log(1 - 2^(-5-h)). Source: Sun et al. 2023 (RetNet, arXiv 2307.08621), eq. 8 as in its released code."""
    return tuple(math.log1p(-(2.0 ** (-5 - h))) for h in range(nheads))


def constant(values: tuple[float, ...], like: Tensor) -> Tensor:
    """`values` on the device of `like`, float32 (float64 beside float64).

    Not a buffer: casting a model would round the decays, and building it on the meta device would lose them.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if torch.compiler.is_compiling():  # a traced tensor must not stay behind
        return torch.tensor(values, dtype=dtype, device=like.device)
    return _kept(values, dtype, like.device)


@functools.lru_cache(maxsize=1024)
def _kept(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # autograd could not save it later
        return torch.tensor(values, dtype=dtype, device=device)
