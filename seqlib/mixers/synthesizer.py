"""Attention whose scores do not look at the keys: Synthesizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from seqlib.errors import ConfigError, UnsupportedInput
from seqlib.layers.init import linear_, normal_
from seqlib.layers.linear import Linear
from seqlib.mixers.base import MixerConfig, positive
from seqlib.mixers.whole import HeadsConfig, WholeHeads

__all__ = ["Synthesizer", "SynthesizerConfig"]


@dataclass(frozen=True, kw_only=True)
class SynthesizerConfig(HeadsConfig):
    """Hyperparameters of `Synthesizer`."""

    kind: str = "synthesizer"
    scores: str = "factorized"
    """"random" (a learned matrix), "factorized" (one of low rank) or "dense" (made from each token by itself)."""
    rank: int = 32
    max_seqlen: int = 4096
    """Longest document; shorter ones use the first rows and columns."""
    causal: bool = False
    """True sees what came before only; the state is then all inputs so far."""
    lra_faithful: bool = False
    """Dense scores folded into heads without a transpose, as google-research/long-range-arena does: a head then weighs
    with the scores of other positions and heads."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "rank", "max_seqlen")
        if self.scores not in ("random", "factorized", "dense"):
            raise ConfigError(f"synthesizer: scores must be random, factorized or dense, got {self.scores!r}")
        if self.lra_faithful and self.scores != "dense":
            raise ConfigError("synthesizer: lra_faithful changes dense scores only; the others are as published")


class Synthesizer(WholeHeads[SynthesizerConfig]):
    """Weights from positions, or from the query alone.

        y_i = sum_j softmax_j(R)_ij v_j;   R: (nheads, max_seqlen, max_seqlen), R1 R2 of low rank,
        or dense:  R_i = score_proj(relu(hidden_proj(x_i)))

    Source: Tay et al. 2020 (arXiv 2005.00743), section 3.
    """

    Config: ClassVar[type[MixerConfig]] = SynthesizerConfig
    supports: ClassVar[frozenset[str]] = WholeHeads.supports | {"initial_state"}
    projections: ClassVar[tuple[str, ...]] = ("v_proj",)

    def __init__(self, config: SynthesizerConfig, d_model: int, **place: Any) -> None:
        super().__init__(config, d_model, **place)
        h, longest, rank = config.nheads, config.max_seqlen, config.rank
        if config.scores == "random":
            self.R = nn.Parameter(torch.empty(h, longest, longest))
        elif config.scores == "factorized":
            self.R1, self.R2 = (nn.Parameter(torch.empty(h, *shape)) for shape in ((longest, rank), (rank, longest)))
        else:
            self.hidden_proj = Linear(d_model, d_model, bias=config.bias)
            self.score_proj = Linear(d_model, h * longest, bias=config.bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for name in ("R", "R1", "R2"):
            if hasattr(self, name):
                normal_(getattr(self, name), 1.0 if name == "R" else self.config.rank**-0.25)
        for name in ("hidden_proj", "score_proj"):
            if hasattr(self, name):
                linear_(getattr(self, name))

    def mix(self, x: Tensor) -> Tensor:
        scores = self._scores(x)
        if self.causal:
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(future, -torch.inf)
        (v,) = self.heads(x)
        return self.out((torch.softmax(scores, -1) @ v.transpose(1, 2)).transpose(1, 2), x)

    def _scores(self, x: Tensor) -> Tensor:
        """(1 or ndocs, nheads, n, n)."""
        c, n = self.config, x.shape[1]
        if n > c.max_seqlen:
            raise UnsupportedInput(
                f"synthesizer has weights for {c.max_seqlen} positions, got {n}; raise max_seqlen or cut"
            )
        if c.scores == "random":
            return self.R[None, :, :n, :n]
        if c.scores == "factorized":
            return (self.R1[:, :n] @ self.R2[..., :n])[None]
        scores = self.score_proj(torch.relu(self.hidden_proj(x))).unflatten(-1, (c.nheads, -1))[..., :n]
        return scores.reshape(len(x), c.nheads, n, n) if c.lra_faithful else scores.transpose(1, 2)
