"""Continuous parameters of a diagonal state space as discrete ones."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["DISCRETIZATIONS", "discretize"]

DISCRETIZATIONS = ("zoh", "bilinear", "dirac")


def discretize(A: Tensor, B: Tensor, dt: Tensor, discretization: str = "zoh") -> tuple[Tensor, Tensor]:
    """The recurrence h_t = exp(log_decay) h_{t-1} + B_bar x_t of the system h' = A h + B x in steps of dt.

        zoh:       log_decay = dt A                                B_bar = B (exp(dt A) - 1) / A
        bilinear:  log_decay = log((1 + dt A/2) / (1 - dt A/2))    B_bar = B dt / (1 - dt A/2)
        dirac:     log_decay = dt A                                B_bar = B   (inputs are impulses)

    Always in float64, because a decay is raised to the power of the sequence length. `zoh` goes smoothly to B dt where
    A goes to 0. LRU and EMA layers, whose parameters are discrete from the start, are "dirac" with A = log(decay).

    Args:
        A: (d, d_state) real or complex.
        B: broadcasts to A.
        dt: (d,), or (d, d_state) for a step per state; positive.

    Returns:
        log_decay and B_bar (d, d_state), float64 or complex128. log_decay is complex for "bilinear" whatever A is,
        since a real state with dt A < -2 changes its sign at every step.

    Source: Gu et al. 2022 (arXiv 2206.11893), equations 3 and 4; state-spaces/s4, models/s4/s4.py.
    """
    A, B = (t.to(torch.promote_types(t.dtype, torch.float64)) for t in (A, B))
    dt = dt.to(torch.float64)
    dt = dt if dt.dim() == A.dim() else dt.unsqueeze(-1)
    # Part by part: as a complex number dt would turn an infinite real part into an imaginary part that is no number.
    z = torch.complex(dt * A.real, dt * A.imag) if A.is_complex() else dt * A
    if discretization == "dirac":
        return _bounded(z), B.expand(torch.broadcast_shapes(z.shape, B.shape))
    if discretization == "zoh":
        return _bounded(z), B * dt * _phi(z)
    z = z.to(torch.complex128)
    decay = ((1 + z / 2) / (1 - z / 2)).to(torch.complex128)
    # A decay of exactly 0 has no logarithm; this one is as good as 0.
    return torch.log(torch.where(decay == 0, 1e-300, decay)), B * dt / (1 - z / 2)


def _bounded(log_decay: Tensor) -> Tensor:
    """With a real part that can be multiplied by any length, zero included; exp(-1000) is nothing even in float64."""
    if not log_decay.is_complex():
        return log_decay.clamp(min=-1000.0)
    return torch.complex(log_decay.real.clamp(min=-1000.0), log_decay.imag)


def _phi(z: Tensor) -> Tensor:
    """(exp(z) - 1) / z; by its series near 0, where the quotient has no digits left."""
    small = z.abs() < 1e-3
    safe = torch.where(small, torch.ones_like(z), z)
    series = 1 + z / 2 * (1 + z / 3 * (1 + z / 4 * (1 + z / 5)))
    return torch.where(small, series, torch.expm1(safe) / safe)
