"""Maps of queries and keys under which a dot product stands for a kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlib.errors import UnsupportedInput
from seqlib.layers.init import fill_

__all__ = ["FEATURE_MAPS", "SIGNED", "feature_size", "positive_random", "random_directions_", "taylor"]


def taylor(x: Tensor) -> Tensor:
    """Features whose dot product is the second-order Taylor polynomial of exp(q . k / sqrt(d)).

        phi(x) = [1, x / d^(1/4), x_i x_j / sqrt(d) for i < j, x_i^2 / sqrt(2 d)]
        phi(q) . phi(k) = 1 + q . k / sqrt(d) + (q . k)^2 / (2 d) >= 1/2

    Products are packed: one of each symmetric pair, so (1 + d + d (d+1) / 2) features of d.

    Raises:
        UnsupportedInput: float16, whose largest number is 65504.

    Source: Arora et al. 2024 (Based, arXiv 2402.18668), section 4.1.
    """
    if x.dtype == torch.float16:
        raise UnsupportedInput(
            "taylor features are squares, which leave the range of float16 where entries pass 512; "
            "use bfloat16 or float32"
        )
    terms = _taylor_terms if torch.compiler.is_compiling() else _kept_taylor_terms
    i, j, factor = terms(x.shape[-1], torch.promote_types(x.dtype, torch.float32), x.device)
    x1 = F.pad(x, (1, 0), value=1.0)
    first, second = (x1.gather(-1, places.expand(*x.shape[:-1], -1)) for places in (i, j))
    return (first * second * factor).to(x.dtype)


def _taylor_terms(d: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of each feature the two factors, as places in (1, x), and what they are multiplied by."""
    one, every = torch.zeros(1 + d, dtype=torch.long, device=device), torch.arange(d + 1, device=device)
    i, j = 1 + torch.triu_indices(d, d, offset=1, device=device)
    factors = (1.0,), (d**-0.25,) * d, (d**-0.5,) * len(i), ((2 * d) ** -0.5,) * d
    factor = torch.tensor(sum(factors, ()), dtype=dtype, device=device)
    return torch.cat([one, i, every[1:]]), torch.cat([every, j, every[1:]]), factor


@functools.lru_cache(maxsize=64)
def _kept_taylor_terms(d: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    with torch.inference_mode(False):  # autograd could not save them later
        return _taylor_terms(d, dtype, device)


def positive_random(x: Tensor, directions: Tensor) -> Tensor:
    """Random features whose products estimate the exponential of the cosine of queries and keys (NPRF).

        phi(x)_i = m^(-1/2) exp(w_i . x / |x| - 1/2),   E[phi(q) . phi(k)] = exp(cos(q, k))

    Without the normalisation the variance grows exponentially with the lengths. Exponents are at most the length of a
    direction, about sqrt(headdim), and are taken in float32 (float64), which they cannot leave.

    Args:
        x: (..., nheads, headdim).
        directions: w, (nheads, m, headdim), see `random_directions_`.

    Returns:
        (..., nheads, m) in float32 (float64 for float64).

    Source: Luo et al. 2021 (arXiv 2106.12566), section 4; Choromanski et al. 2021 (Performer, arXiv 2009.14794).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    along = torch.einsum("...hp,hmp->...hm", F.normalize(x.to(wide), dim=-1), directions.to(wide))
    return torch.exp(along - 0.5) * directions.shape[1] ** -0.5


def random_directions_(directions: Tensor) -> None:
    """Normal directions (nheads, m, headdim), orthogonal in blocks of headdim, which lowers the variance."""
    nheads, m, headdim = directions.shape
    dtype = torch.promote_types(directions.dtype, torch.float32)  # QR knows no 16-bit numbers
    blocks = torch.randn(nheads, -(-m // headdim), headdim, headdim, device=directions.device, dtype=dtype)
    Q, R = torch.linalg.qr(blocks)
    # The signs that QR chooses would leave a preferred side.
    Q = Q * R.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    lengths = torch.randn_like(blocks).norm(dim=-1, keepdim=True)
    fill_(directions, (Q * lengths).flatten(1, 2)[:, :m])


SIGNED = ("identity", "elu")
"""Maps with negative values, whose sums are no denominator."""
FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "elu": F.elu,
    "elu1": lambda x: F.elu(x) + 1,
    "relu": F.relu,
    "taylor": taylor,
}


def feature_size(name: str, d: int) -> int:
    """How many features the map makes of d."""
    return 1 + d + d * (d + 1) // 2 if name == "taylor" else d
