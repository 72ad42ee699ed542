"""Relative weights as sums of exponentials, which a recurrence of fixed size can follow."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlib.context import undisturbed

__all__ = ["RANGE", "Exponentials", "exponential_count", "fit_exponentials", "relative_weights"]

# Biases this far below the largest one count as this far: in float32 e^-16 is next to nothing beside 1, and what a
# float64 transform rounds off stays a hundred thousand times smaller for sequences of ten thousand tokens.
RANGE = 16.0
# Rows of the Hankel matrix: what is remembered of a kernel shows in its first values.
_ROWS = 512


class Exponentials(NamedTuple):
    """w_r ~ sum_m Re(weights_m rates_m^r) for every head, with the largest error at any distance of the window."""

    weights: Tensor  # (nheads, n) complex
    rates: Tensor  # (nheads, n) complex, |rate| <= 1
    error: float  # of weights whose largest is 1


def relative_weights(bias: Tensor) -> Tensor:
    """exp(bias) in float32 (float64), the largest of each head 1 and the smallest at least e^-16."""
    bias = bias.to(torch.promote_types(bias.dtype, torch.float32))
    return (bias - bias.detach().amax(-1, keepdim=True)).clamp(min=-RANGE).exp()


def _rows(window: int) -> int:
    return max(2, min(_ROWS, (window + 1) // 2))


def exponential_count(window: int, n: int) -> int:
    """How many exponentials `fit_exponentials` makes of n: a narrow window does not tell more apart."""
    return min(n, _rows(window) - 1)


@undisturbed
@torch.no_grad()
def fit_exponentials(bias: Tensor, n: int) -> Exponentials:
    """The n exponentials whose sum follows the weights of a causal bias (nheads, window).

    The n leading left singular vectors of the Hankel matrix of the weights shift into themselves; the eigenvalues of
    that shift are the rates, and the weights then are a least-squares fit. Exact for a kernel that is such a sum.

    Source: Kung 1978, state-space realisation from a Hankel matrix; the use for decoding: see `rpe_attention`.
    """
    kernel = relative_weights(bias.double())
    kernel = F.pad(kernel, (0, max(0, 3 - kernel.shape[-1])))  # beyond the window nothing is seen
    window = kernel.shape[-1]
    hankel = kernel.unfold(-1, window - _rows(window) + 1, 1)  # h rows columns
    n = exponential_count(window, n)
    left, values, _ = torch.linalg.svd(hankel, full_matrices=False)
    # Vectors of rounding alone would bend the others' rates.
    left = left[..., :n] * (values > 1e-10 * values[:, :1])[:, None, :n]
    rates = torch.linalg.eigvals(torch.linalg.pinv(left[:, :-1]) @ left[:, 1:])
    rates = rates / rates.abs().clamp(min=1)
    rates = torch.where(rates.abs() < 1e-30, 1e-30, rates)  # complex powers of zero are no numbers
    powers = rates[:, None] ** torch.arange(window, device=kernel.device)[:, None]  # h r m
    weights = (torch.linalg.pinv(powers) @ kernel[..., None].to(powers.dtype))[..., 0]
    error = ((powers @ weights[..., None])[..., 0].real - kernel).abs().max()
    return Exponentials(weights, rates, float(error))
