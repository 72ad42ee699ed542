"""Attention through fewer keys: Linformer, Nystromformer, Luna."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqlib.errors import ConfigError, UnsupportedInput
from seqlib.layers.init import normal_
from seqlib.mixers.base import MixerConfig, positive, unpadded, wide
from seqlib.mixers.whole import HeadsConfig, WholeHeads, softmax_attention
from seqlib.sequence import SequenceInfo

__all__ = ["Linformer", "LinformerConfig", "Luna", "LunaConfig", "Nystromformer", "NystromformerConfig", "nystrom"]


@dataclass(frozen=True, kw_only=True)
class LinformerConfig(HeadsConfig):
    """Hyperparameters of `Linformer`."""

    kind: str = "linformer"
    rank: int = 128
    """Keys that are left; Long Range Arena's default is 16."""
    max_seqlen: int = 4096
    """Longest document; shorter ones use the first rows of the projections."""
    lra_faithful: bool = False
    """As google-research/long-range-arena: one projection for keys and values, and padding counts as tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "rank", "max_seqlen")


class Linformer(WholeHeads[LinformerConfig]):
    """Keys and values summed over positions with learned weights.

        y = softmax(q (E^T k)^T / sqrt(headdim)) F^T v,   E, F: (max_seqlen, rank), shared by the heads

    Source: Wang et al. 2020 (arXiv 2006.04768), section 4; start N(0, 1/rank) as in HazyResearch/fly.
    """

    Config: ClassVar[type[MixerConfig]] = LinformerConfig

    def __init__(self, config: LinformerConfig, d_model: int, **place: Any) -> None:
        super().__init__(config, d_model, **place)
        self.E = nn.Parameter(torch.empty(config.max_seqlen, config.rank))
        self.F = None if config.lra_faithful else nn.Parameter(torch.empty(config.max_seqlen, config.rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for weight in (self.E, self.F):
            if weight is not None:
                normal_(weight, self.config.rank**-0.5)

    def _each_document(self, x: Tensor, seq: SequenceInfo | None) -> Tensor:
        return super()._each_document(x, unpadded(self.config, seq) if self.config.lra_faithful else seq)

    def attend(self, *heads: Tensor) -> Tensor:
        q, k, v = heads
        n, longest = q.shape[1], self.config.max_seqlen
        if n > longest:
            raise UnsupportedInput(f"linformer has weights for {longest} positions, got {n}; raise max_seqlen or cut")
        E, F_ = self.E[:n], (self.E if self.F is None else self.F)[:n]
        return softmax_attention(q, torch.einsum("blhp,lr->brhp", k, E), torch.einsum("blhp,lr->brhp", v, F_))


@dataclass(frozen=True, kw_only=True)
class NystromformerConfig(HeadsConfig):
    """Hyperparameters of `Nystromformer`."""

    kind: str = "nystromformer"
    landmarks: int = 64
    """Means of queries and of keys over segments of like length; a shorter document is attended to exactly."""
    iterations: int = 6
    """Of the approximate inverse."""
    conv: int | None = 33
    """Width of the convolution of the values beside it, per head; odd, None for none."""
    lra_faithful: bool = False
    """Start the inverse from the largest column sum of the whole batch, as the published code does by default; the
    answer to one document then depends on the others."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "landmarks", "iterations", "conv")
        if self.conv is not None and self.conv % 2 == 0:
            raise ConfigError(f"nystromformer: conv must be odd, got {self.conv}")


class Nystromformer(WholeHeads[NystromformerConfig]):
    """Softmax attention by the Nystrom method.

        y = softmax(q k~^T) softmax(q~ k~^T)^+ softmax(q~ k^T) v + conv(v),   q~ and k~ means over segments

    Source: Xiong et al. 2021 (arXiv 2102.03902), eq. 13-16; mlpen/Nystromformer, whose segments must divide the
    sequence; here they differ by at most one token.
    """

    Config: ClassVar[type[MixerConfig]] = NystromformerConfig

    def __init__(self, config: NystromformerConfig, d_model: int, **place: Any) -> None:
        super().__init__(config, d_model, **place)
        self.conv = None if config.conv is None else nn.Parameter(torch.empty(config.nheads, 1, config.conv))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.conv is not None:
            normal_(self.conv, self.conv.shape[-1] ** -0.5)

    def attend(self, *heads: Tensor) -> Tensor:
        q, k, v = heads
        c = self.config
        if q.shape[1] <= c.landmarks:
            y = softmax_attention(q, k, v)
        else:
            y = nystrom(q, k, v, c.landmarks, iterations=c.iterations, per_matrix=not c.lra_faithful)
        if self.conv is None:
            return y
        columns = v.permute(0, 3, 2, 1)  # b p h l
        local = F.conv1d(columns.flatten(0, 1), self.conv, padding="same", groups=c.nheads)
        return y + local.unflatten(0, columns.shape[:2]).permute(0, 3, 2, 1)


def nystrom(q: Tensor, k: Tensor, v: Tensor, landmarks: int, *, iterations: int, per_matrix: bool = True) -> Tensor:
    """softmax(q k~^T) softmax(q~ k~^T)^+ softmax(q~ k^T) v in float32; q, k, v: (b, n, h, p).

    Args:
        per_matrix: scale the start of the inverse by each matrix's own largest column sum, not by that of the batch.
    """
    dtype = q.dtype
    q, k, v = (wide(t).transpose(1, 2) for t in (q, k, v))  # b h l p
    q, k = q * q.shape[-1] ** -0.25, k * k.shape[-1] ** -0.25
    n = q.shape[2]
    segment = torch.arange(n, device=q.device) * landmarks // n
    mean = F.one_hot(segment, landmarks).to(q.dtype)
    mean = (mean / mean.sum(0)).t()
    q_mean, k_mean = mean @ q, mean @ k
    near, middle, far = (torch.softmax(a @ b.mT, -1) for a, b in ((q, k_mean), (q_mean, k_mean), (q_mean, k)))
    return (near @ _inverse(middle, iterations, per_matrix) @ (far @ v)).transpose(1, 2).to(dtype)


def _inverse(A: Tensor, iterations: int, per_matrix: bool) -> Tensor:
    """The pseudo-inverse of matrices whose rows sum to 1, by iterations of third order."""
    columns = A.sum(-2)
    Z = A.mT / (columns.amax(-1)[..., None, None] if per_matrix else columns.amax())
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    for _ in range(iterations):
        AZ = A @ Z
        Z = Z @ (13 * eye - AZ @ (15 * eye - AZ @ (7 * eye - AZ))) / 4
    return Z


@dataclass(frozen=True, kw_only=True)
class LunaConfig(HeadsConfig):
    """Hyperparameters of `Luna`."""

    kind: str = "luna"
    d_packed: int = 256
    """Length of the packed sequence."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "d_packed")


class Luna(WholeHeads[LunaConfig]):
    """Attention in two steps through a short learned sequence.

        packed = softmax(pack_q_proj(P) c^T / sqrt(headdim)) c,   c = k_proj(x), keys and values alike
        y = softmax(q_proj(x) packed^T / sqrt(headdim)) packed

    Source: Ma et al. 2021 (arXiv 2106.01540), eq. 4-6, whose packed sequence goes on to the next layer; here every
    layer has its own P, because a layer hands on nothing but its output.
    """

    Config: ClassVar[type[MixerConfig]] = LunaConfig
    projections: ClassVar[tuple[str, ...]] = ("q_proj", "c_proj", "pack_q_proj")

    def __init__(self, config: LunaConfig, d_model: int, **place: Any) -> None:
        super().__init__(config, d_model, **place)
        self.P = nn.Parameter(torch.empty(config.d_packed, d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        normal_(self.P, self.d_model**-0.5)

    def heads(self, x: Tensor) -> list[Tensor]:
        sources = {"q_proj": x, "c_proj": x, "pack_q_proj": self.P[None]}
        return [self.get_submodule(name)(x).unflatten(-1, (-1, self.headdim)) for name, x in sources.items()]

    def attend(self, *heads: Tensor) -> Tensor:
        q, c, pack = map(wide, heads)  # packed positions start nearly alike; 16 bits would hide where they differ
        packed = softmax_attention(pack.expand(len(c), -1, -1, -1), c, c)
        return softmax_attention(q, packed, packed)
