"""HiPPO matrices, their normal-plus-low-rank form, and the initialisations of diagonal state spaces."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from seqlib.errors import ConfigError

__all__ = ["DIAGONAL", "MEASURES", "NPLR", "diagonal", "hippo", "nplr"]

MEASURES = ("legs", "legt", "fourier")
DIAGONAL = ("lin", "inv", "inv2", "quad", "real", "legs")


class NPLR(NamedTuple):
    """One of every conjugate pair of diag(A) - P P*: A, B (n/2,), P (rank, n/2), and V (n, n/2) with B = V* B_hippo."""

    A: Tensor
    P: Tensor
    B: Tensor
    V: Tensor


def hippo(measure: str, n: int) -> tuple[Tensor, Tensor]:
    """The matrices A (n, n), B (n,) of x' = A x + B u that project a signal on a basis, float64.

        legs     A[i, k] = -sqrt(2i+1) sqrt(2k+1) below the diagonal, -(i+1) on it; B[i] = sqrt(2i+1)
        legt     A[i, k] = -1/2 sqrt(2i+1) sqrt(2k+1) ((-1)^(i-k) above the diagonal, else 1); B[i] = 1/2 sqrt(2i+1)
        fourier  A = blocks of rotation by pi f, f = 0 .. n/2-1, minus B B^T; B = 1, 0, sqrt 2, 0, sqrt 2, 0, ...

    Source: Gu et al. 2020 (HiPPO, arXiv 2008.07669), appendix D; Gu et al. 2022 (arXiv 2206.12037) for fourier and the
    factor 1/2 of legt.
    """
    _even(n)
    i = torch.arange(n, dtype=torch.float64)
    root = torch.sqrt(2 * i + 1)
    if measure == "legs":
        return -torch.tril(torch.outer(root, root), -1) - torch.diag(i + 1), root
    if measure == "legt":
        sign = torch.where(i[:, None] < i, (-1.0) ** (i[:, None] - i), 1.0)
        return -0.5 * torch.outer(root, root) * sign, 0.5 * root
    if measure == "fourier":
        A = torch.zeros(n, n, dtype=torch.float64)
        even = torch.arange(0, n, 2)
        A[even + 1, even] = math.pi * i[: n // 2]
        A[even, even + 1] = -math.pi * i[: n // 2]
        B = torch.zeros(n, dtype=torch.float64)
        B[even] = math.sqrt(2)
        B[0] = 1.0
        return A - torch.outer(B, B), B
    raise ConfigError(f"unknown HiPPO measure {measure!r}; known: {', '.join(MEASURES)}")


def nplr(measure: str, n: int) -> NPLR:
    """HiPPO as a normal matrix minus a low-rank one, in the eigenbasis of the normal one; complex128.

    Eigenvalues with negative imaginary part, most negative first. An eigenvector is only defined up to a phase, which
    LAPACKs choose differently; here it makes B real and not negative, so that everybody gets the same numbers.

    Source: Gu et al. 2022 (S4, arXiv 2111.00396), theorem 1 and appendix C.
    """
    A, B = hippo(measure, n)
    root = torch.sqrt(2 * torch.arange(n, dtype=torch.float64) + 1)
    if measure == "fourier":
        P = B[None]
        V = torch.zeros(n, n // 2, dtype=torch.complex128)
        at = torch.arange(n // 2)
        V[2 * at, at] += math.sqrt(0.5)
        V[2 * at + 1, at] += 1j * math.sqrt(0.5)
        # The rotations are eigenvalues as they stand; a solver could not tell the two of frequency 0 apart.
        values = torch.complex(torch.zeros(n // 2, dtype=torch.float64), -math.pi * at.double())
        order = at.flip(0)
        values, V = values[order], V[:, order]
    else:
        even = torch.arange(n) % 2 == 0
        # The two vectors of legt are its halves by parity.
        P = torch.stack([torch.where(even, 0.0, root), torch.where(even, root, 0.0)]) / math.sqrt(2)
        P = P.sum(0, keepdim=True) if measure == "legs" else P
        normal = A + P.mT @ P
        real = -0.5 if measure == "legs" else 0.0
        imag, V = torch.linalg.eigh(-1j * (normal - real * torch.eye(n)).to(torch.complex128))
        imag, V = imag[: n // 2], V[:, : n // 2]
        values = torch.complex(torch.full_like(imag, real), imag)
    read = V.mH @ B.to(V.dtype)
    V = V * torch.where(read == 0, 1.0, read / read.abs().clamp(min=1e-300))
    return NPLR(values, P.to(V.dtype) @ V.conj(), (V.mH @ B.to(V.dtype)).real.to(V.dtype), V)


def diagonal(name: str, n: int, *, clip: float | None = None) -> tuple[Tensor, Tensor]:
    """A and B (n/2,) of a diagonal state space of n real states, complex128; for "real" (n,) float64.

        lin    A_k = -1/2 - i pi k                         B = 1
        inv    A_k = -1/2 - i (n/pi) (n/(2k+1) - 1)        B = 1
        inv2   A_k = -1/2 - i (n/pi) (n/(k+1) - 1)         B = 1
        quad   A_k = -1/2 - i (1+2k)^2/pi                  B = 1
        real   A_k = -(k+1)                                B = 1
        legs   A, B of nplr("legs", n) without its low rank

    Args:
        clip: largest entry of B. state-spaces/s4 clips the imaginary parts of B at 2, which are nearly its sizes.

    Source: Gu et al. 2022 (S4D, arXiv 2206.11893), section 4; state-spaces/s4, models/s4/s4.py, and there also that
    the B of legs is not halved.
    """
    _even(n)
    k = torch.arange(n // 2, dtype=torch.float64)
    if name == "real":
        return -(torch.arange(n, dtype=torch.float64) + 1), torch.ones(n, dtype=torch.float64)
    if name == "legs":
        A, _, B, _ = nplr("legs", n)
        return A, B if clip is None else B.real.clamp(max=clip).to(B.dtype)
    imag = {
        "lin": math.pi * k,
        "inv": n / math.pi * (n / (2 * k + 1) - 1),
        "inv2": n / math.pi * (n / (k + 1) - 1),
        "quad": (1 + 2 * k).square() / math.pi,
    }
    if name not in imag:
        raise ConfigError(f"unknown initialisation {name!r}; known: {', '.join(DIAGONAL)}")
    A = torch.complex(torch.full_like(k, -0.5), -imag[name])
    return A, torch.ones_like(A)


def _even(n: int) -> None:
    if n < 2 or n % 2:
        raise ConfigError(f"the number of states must be even and positive, got {n}")
