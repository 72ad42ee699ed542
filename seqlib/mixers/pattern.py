"""Softmax attention over a fixed pattern of pairs: Longformer, BigBird, Sparse Transformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from seqlib.errors import ConfigError
from seqlib.mixers.base import MixerConfig, positive
from seqlib.mixers.whole import HeadsConfig, WholeHeads, softmax_attention

__all__ = [
    "BigBird", "BigBirdConfig", "Longformer", "LongformerConfig", "PatternConfig", "SparseAttention",
    "SparseAttentionConfig",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PatternConfig(HeadsConfig):
    """Hyperparameters of attention over a pattern."""

    causal: bool = False
    """True sees what came before only; the state is then all inputs so far."""


P = TypeVar("P", bound=PatternConfig)


class PatternAttention(WholeHeads[P]):
    """Softmax attention where `pattern` allows it.

    All scores are computed and those outside the pattern dropped: the accuracy of the published models at the cost of
    full attention.
    """

    supports: ClassVar[frozenset[str]] = WholeHeads.supports | {"initial_state"}

    def __init__(self, config: P, d_model: int, **place: Any) -> None:
        super().__init__(config, d_model, **place)
        self.reset_parameters()

    def pattern(self, n: int) -> Tensor:
        """(n, n) bool, True where query i sees key j; causal ones do not depend on n."""
        raise NotImplementedError

    def attend(self, *heads: Tensor) -> Tensor:
        q, k, v = heads
        return softmax_attention(q, k, v, self.allowed(q.shape[1]).to(q.device))

    def allowed(self, n: int) -> Tensor:
        return self.pattern(n).tril() if self.causal else self.pattern(n)


@dataclass(frozen=True, kw_only=True)
class LongformerConfig(PatternConfig):
    """Hyperparameters of `Longformer`."""

    kind: str = "longformer"
    window: int = 512
    """Tokens that are seen around each one, itself included; of an even number one more lies before it."""
    n_global: int = 1
    """The first tokens, which see and are seen by all. The baseline of Long Range Arena has none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "window")
        if self.n_global < 0:
            raise ConfigError(f"longformer: n_global must be 0 or more, got {self.n_global}")


class Longformer(PatternAttention[LongformerConfig]):
    """A window around each token, and a few global tokens with projections of their own.

        y_i = softmax over j with -window/2 <= j - i < window/2 or j < n_global
        y_i = softmax over all j of q'_i . k'_j, of values v'_j, for i < n_global

    Source: Beltagy et al. 2020 (arXiv 2004.05150), section 3.1.
    """

    Config: ClassVar[type[MixerConfig]] = LongformerConfig
    projections: ClassVar[tuple[str, ...]] = (
        "q_proj", "k_proj", "v_proj", "global_q_proj", "global_k_proj", "global_v_proj",
    )  # fmt: skip

    def __init__(self, config: LongformerConfig, d_model: int, **place: Any) -> None:
        super().__init__(config, d_model, **place)
        if not config.n_global:
            for name in self.projections[3:]:  # nothing passes them
                self.get_submodule(name).requires_grad_(False)

    def pattern(self, n: int) -> Tensor:
        c, at = self.config, torch.arange(n)
        ahead = at[None, :] - at[:, None]
        near = (ahead >= -(c.window // 2)) & (ahead <= (c.window - 1) // 2)
        return near | (at < c.n_global)

    def attend(self, *heads: Tensor) -> Tensor:
        y = super().attend(*heads[:3])
        q, k, v = heads[3:]
        few = min(self.config.n_global, q.shape[1])
        if not few:
            return y
        mask = torch.ones(few, q.shape[1], dtype=torch.bool, device=q.device).tril() if self.causal else None
        return torch.cat([softmax_attention(q[:, :few], k, v, mask), y[:, few:]], 1)


@dataclass(frozen=True, kw_only=True)
class BigBirdConfig(PatternConfig):
    """Hyperparameters of `BigBird`."""

    kind: str = "bigbird"
    block: int = 64
    near: int = 3
    """Blocks that are seen around each one, itself included; odd."""
    n_random: int = 3
    """Random blocks that each block sees; fixed by `seed`, the layer and the number of the block."""
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "block", "near")
        if self.near % 2 == 0 or self.n_random < 0:
            raise ConfigError(f"bigbird: need an odd near and n_random >= 0, got {self.near} and {self.n_random}")


class BigBird(PatternAttention[BigBirdConfig]):
    """Blocks of tokens that see their neighbours, the first and last block and a few random ones.

    The first and the last block see and are seen by all; causal, only the first one is.

    Source: Zaheer et al. 2020 (arXiv 2007.14062), section 2 (internal transformer construction).
    """

    Config: ClassVar[type[MixerConfig]] = BigBirdConfig

    def pattern(self, n: int) -> Tensor:
        c = self.config
        count = -(-n // c.block)
        at = torch.arange(count)
        seen = (at[None, :] - at[:, None]).abs() <= c.near // 2
        ends = [0] if self.causal else [0, count - 1]
        seen[ends], seen[:, ends] = True, True
        for i in range(count):
            generator = torch.Generator().manual_seed((c.seed * 1000 + self.layer_index) * 100_000 + i)
            with torch._C._DisableFuncTorch():  # the same numbers for every sample, which vmap does not know
                drawn = torch.randperm(i if self.causal else count, generator=generator)[: c.n_random]
            seen[i, drawn] = True
        return seen.repeat_interleave(c.block, 0).repeat_interleave(c.block, 1)[:n, :n]


@dataclass(frozen=True, kw_only=True)
class SparseAttentionConfig(PatternConfig):
    """Hyperparameters of `SparseAttention`."""

    kind: str = "sparse_attention"
    block: int = 128
    summary: int = 32
    """The last tokens of each block, which all later (bidirectional: all) tokens see, beside its first one."""
    lra_faithful: bool = False
    """Causal in an encoder too, as google-research/long-range-arena has it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "block", "summary")
        if self.summary > self.block:
            raise ConfigError(f"sparse_attention: summary must be at most block={self.block}, got {self.summary}")


class SparseAttention(PatternAttention[SparseAttentionConfig]):
    """The fixed pattern of Sparse Transformer: the own block, and a few tokens of every block.

        j seen by i if j // block = i // block, or j mod block = 0, or j mod block >= block - summary

    Source: Child et al. 2019 (arXiv 1904.10509), section 4.2 (fixed attention); google-research/long-range-arena.
    """

    Config: ClassVar[type[MixerConfig]] = SparseAttentionConfig

    def pattern(self, n: int) -> Tensor:
        c, at = self.config, torch.arange(n)
        inside = at % c.block
        return (at[:, None] // c.block == at // c.block) | (inside == 0) | (inside >= c.block - c.summary)

    def allowed(self, n: int) -> Tensor:
        return self.pattern(n).tril() if self.config.lra_faithful else super().allowed(n)
