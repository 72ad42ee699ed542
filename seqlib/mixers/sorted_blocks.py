"""Attention within blocks of tokens that are fixed, learned or hashed: local, Sinkhorn, Reformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlib.errors import ConfigError, UnsupportedInput
from seqlib.layers.init import linear_, normal_
from seqlib.layers.linear import Linear
from seqlib.mixers.base import MixerConfig, positive, wide
from seqlib.mixers.whole import HeadsConfig, WholeHeads, softmax_attention
from seqlib.sequence import SequenceInfo

__all__ = ["LocalAttention", "LocalAttentionConfig", "Reformer", "ReformerConfig", "Sinkhorn", "SinkhornConfig"]

_SELF = -5e4  # added to the score of a token with itself, which then counts only where there is no other


@dataclass(frozen=True, kw_only=True)
class LocalAttentionConfig(HeadsConfig):
    """Hyperparameters of `LocalAttention`."""

    kind: str = "local_attention"
    block: int = 50
    lra_faithful: bool = False
    """As google-research/long-range-arena, which is not local: see `strided_blocks`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "block")


class LocalAttention(WholeHeads[LocalAttentionConfig]):
    """Softmax attention within blocks of `block` neighbouring tokens, in both directions.

    `diag_attention` is the causal form. Attention over a sliding window is another baseline: `sliding_attention`.

    Source: Tay et al. 2020 (Long Range Arena, arXiv 2011.04006), section 3.2.
    """

    Config: ClassVar[type[MixerConfig]] = LocalAttentionConfig

    def __init__(self, config: LocalAttentionConfig, d_model: int, **place: Any) -> None:
        super().__init__(config, d_model, **place)
        self.reset_parameters()

    def _each_document(self, x: Tensor, seq: SequenceInfo | None) -> Tensor:
        if not self.config.lra_faithful:
            return super()._each_document(x, seq)
        (q, k, v), mask = strided_blocks(self.heads(x), self.config.block, seq, self.config)
        return self.out(restored(_per_block(q, k, v, mask), x.shape[1]), x)

    def attend(self, *heads: Tensor) -> Tensor:
        (q, k, v), real = in_blocks(heads, self.config.block)
        return _per_block(q, k, v, real.expand(q.shape[:3])).flatten(1, 2)[:, : heads[0].shape[1]]


@dataclass(frozen=True, kw_only=True)
class SinkhornConfig(HeadsConfig):
    """Hyperparameters of `Sinkhorn`."""

    kind: str = "sinkhorn"
    block: int = 50
    max_seqlen: int = 4096
    """Longest document; the sorting of blocks has weights for that many."""
    iterations: int = 8
    """Of normalising rows and columns in turn."""
    lra_faithful: bool = False
    """As google-research/long-range-arena: strided blocks (see `strided_blocks`) and one iteration of scores that are
    cut to [-1, 1]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "block", "max_seqlen", "iterations")


class Sinkhorn(WholeHeads[SinkhornConfig]):
    """Attention to the own block and to one that a learned soft permutation puts beside it.

        R = sinkhorn(sort_proj(mean of each block of x));   k', v' = R k, R v over blocks
        y = attention(q, k, v) + attention(q, k', v') within blocks

    The two attentions are normalised each for itself.

    Source: Tay et al. 2020 (Sparse Sinkhorn Attention, arXiv 2002.11296), section 3.
    """

    Config: ClassVar[type[MixerConfig]] = SinkhornConfig

    def __init__(self, config: SinkhornConfig, d_model: int, **place: Any) -> None:
        super().__init__(config, d_model, **place)
        self.sort_proj = Linear(d_model, -(-config.max_seqlen // config.block), bias=config.bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        linear_(self.sort_proj)

    def _each_document(self, x: Tensor, seq: SequenceInfo | None) -> Tensor:
        if not self.config.lra_faithful:
            return super()._each_document(x, seq)
        blocks, mask = strided_blocks([x[:, :, None], *self.heads(x)], self.config.block, seq, self.config)
        return self.out(restored(self._attend(blocks[0].squeeze(-2), blocks[1:], mask), x.shape[1]), x)

    def mix(self, x: Tensor) -> Tensor:
        (inputs, *blocks), real = in_blocks([x[:, :, None], *self.heads(x)], self.config.block)
        y = self._attend(inputs.squeeze(-2), blocks, real.expand(inputs.shape[:3]))
        return self.out(y.flatten(1, 2)[:, : x.shape[1]], x)

    def _attend(self, x: Tensor, blocks: list[Tensor], real: Tensor) -> Tensor:
        """x (b, c, n, d_model) and heads (b, c, n, h, p) by blocks, real (b, c, n) -> heads."""
        q, k, v = blocks
        count = real.sum(-1, keepdim=True).clamp(min=1)
        order = self._order(((x * real[..., None]).sum(2) / count).to(x.dtype))
        there = torch.einsum("bij,bjn->bin", order, real.to(order.dtype))
        # A block that is not full has nothing to give at its end: what arrives there is divided by what was there.
        share = there.clamp(min=1e-9)[..., None, None]
        k2, v2 = ((torch.einsum("bij,bjnhp->binhp", order, wide(t)) / share).to(t.dtype) for t in (k, v))
        return _per_block(q, k, v, real) + _per_block(q, k2, v2, there > 1e-6)

    def _order(self, summaries: Tensor) -> Tensor:
        """(b, c, c) soft permutations of blocks from their summaries (b, c, d_model)."""
        count = summaries.shape[1]
        if count > self.sort_proj.out_features:
            raise UnsupportedInput(
                f"sinkhorn has weights for {self.config.max_seqlen} positions, got {count * self.config.block}; "
                "raise max_seqlen or cut"
            )
        scores = wide(self.sort_proj(summaries))[..., :count]
        if self.config.lra_faithful:
            scores, iterations = scores.clamp(-1, 1), 1
        else:
            iterations = self.config.iterations
        for _ in range(iterations):
            scores = scores - scores.logsumexp(-1, keepdim=True)
            scores = scores - scores.logsumexp(-2, keepdim=True)
        return scores.exp()


@dataclass(frozen=True, kw_only=True)
class ReformerConfig(HeadsConfig):
    """Hyperparameters of `Reformer`."""

    kind: str = "reformer"
    bucket: int = 64
    """Tokens per chunk of the sorted sequence; about as many share a bucket."""
    n_hashes: int = 2
    """Rounds of hashing; Long Range Arena runs 2, the published default is 8."""
    max_buckets: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "bucket", "n_hashes", "max_buckets")
        if self.max_buckets % 2:
            raise ConfigError(f"reformer: max_buckets must be even, got {self.max_buckets}")


class Reformer(WholeHeads[ReformerConfig]):
    """Attention among tokens that random rotations hash to the same or the previous chunk.

        bucket = argmax [q R; -q R];  tokens sorted by bucket and cut into chunks
        y = softmax over the tokens of the own and the previous chunk, of all rounds, each once;  k = q / |q|

    A token sees itself only where it sees nobody else. The rotations are drawn once and saved with the model.

    Source: Kitaev et al. 2020 (arXiv 2001.04451), section 2, which hashes anew in every call.
    """

    Config: ClassVar[type[MixerConfig]] = ReformerConfig
    projections: ClassVar[tuple[str, ...]] = ("q_proj", "v_proj")
    rotations: Tensor

    def __init__(self, config: ReformerConfig, d_model: int, **place: Any) -> None:
        super().__init__(config, d_model, **place)
        self.register_buffer("rotations", torch.empty(config.n_hashes, self.headdim, config.max_buckets // 2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        normal_(self.rotations, 1.0)

    def attend(self, *heads: Tensor) -> Tensor:
        q, v = (wide(t).transpose(1, 2) for t in heads)  # b h l p
        k = F.normalize(q, dim=-1)
        n, c = q.shape[2], self.config
        if n <= c.bucket:
            own = torch.zeros(n, n, dtype=q.dtype, device=q.device).fill_diagonal_(_SELF)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=own).transpose(1, 2).to(heads[0].dtype)
        order = self._order(q, n)  # b h r l
        place = torch.argsort(order, dim=-1)
        padded = F.pad(order, (0, -n % c.bucket), value=n).unflatten(-1, (-1, c.bucket))  # b h r c m
        seen = torch.cat([padded.roll(1, -2), padded], -1)
        # Chunk by chunk: scores of m queries against 2 m keys; the empty places of the last chunk hold zeros.
        chunks = [_take(t, padded) for t in (q, k, v)]
        keys, values = (torch.cat([t.roll(1, -3), t], -2) for t in chunks[1:])
        scores = chunks[0] @ keys.mT * q.shape[-1] ** -0.5
        scores = scores.masked_fill((seen == n)[..., None, :], -torch.inf)
        scores = scores + _SELF * (padded[..., None] == seen[..., None, :])
        # Back in the order of the sequence, so that every query has the keys of all rounds beside each other.
        everywhere = _back(scores, place).movedim(2, 3).flatten(3)
        ids = _back(seen[..., None, :].expand_as(scores), place).movedim(2, 3).flatten(3)
        weights = torch.softmax(everywhere - _multiplicity(ids).log(), -1)
        weights = weights.unflatten(-1, (c.n_hashes, -1)).movedim(3, 2)
        y = _take(weights, padded) @ values
        return _back(y, place).sum(2).transpose(1, 2).to(heads[0].dtype)

    @torch.no_grad()
    def _order(self, q: Tensor, n: int) -> Tensor:
        """(b, h, rounds, l) positions by bucket, those of one bucket in their order."""
        half = max(1, min(self.config.max_buckets, 2 * round(n / self.config.bucket / 2)) // 2)
        turned = torch.einsum("bhlp,rpk->bhrlk", q, wide(self.rotations)[..., :half])
        return torch.argsort(torch.cat([turned, -turned], -1).argmax(-1), dim=-1, stable=True)


def _per_block(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention within blocks: q, k, v (b, c, n, h, p), mask (b, c, n) of the keys that are seen."""
    flat = [t.flatten(0, 1) for t in (q, k, v)]
    return softmax_attention(flat[0], flat[1], flat[2], mask.flatten(0, 1)[:, None, None]).unflatten(0, q.shape[:2])


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (b, h, r, c, m) of x (b, h, l, p) or (b, h, r, l, p), zeros where it is l: (b, h, r, c, m, p)."""
    x = F.pad(x, (0, 0, 0, 1))
    x = (x if x.dim() == 5 else x[:, :, None]).expand(-1, -1, index.shape[2], -1, -1)
    flat = index.flatten(3)[..., None].expand(-1, -1, -1, -1, x.shape[-1])
    return x.gather(3, flat).unflatten(3, index.shape[3:])


def _back(x: Tensor, place: Tensor) -> Tensor:
    """(b, h, r, c, m, p) in sorted order -> (b, h, r, l, p) in that of the sequence."""
    x = x.flatten(3, 4)
    return x.gather(3, place[..., None].expand(-1, -1, -1, -1, x.shape[-1]))


def _multiplicity(ids: Tensor) -> Tensor:
    """How often each id occurs in its row."""
    ids = ids.contiguous()
    ordered = ids.sort(-1).values
    count = torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)
    return count.to(torch.get_default_dtype())


def in_blocks(parts: Any, block: int) -> tuple[list[Tensor], Tensor]:
    """Each (b, n, ...) as (b, nblocks, block, ...), and (nblocks, block) True at tokens; the last block has zeros."""
    n = parts[0].shape[1]
    missing = -n % block
    cut = [F.pad(t, (0, 0, 0, 0, 0, missing)).unflatten(1, (-1, block)) for t in parts]
    real = torch.arange(n + missing, device=parts[0].device).unflatten(0, (-1, block)) < n
    return cut, real


def strided_blocks(
    parts: list[Tensor], block: int, seq: SequenceInfo | None, config: MixerConfig
) -> tuple[list[Tensor], Tensor]:
    """The blocks of google-research/long-range-arena, local_attention.py.

    The sequence is padded by block - n mod block (a whole block where nothing is missing) and folded so that tokens
    with equal index modulo the number of blocks attend to each other. The mask is folded the other way, so that it
    hides other tokens than the padding, and marks what was added as tokens.
    """
    if seq is not None and seq.starts is not None:
        raise UnsupportedInput(f"{config.kind} with lra_faithful=True knows no packed documents; pad them")
    batch, n = parts[0].shape[:2]
    added = block - n % block
    mask = torch.ones(batch, n, dtype=torch.bool, device=parts[0].device)
    if seq is not None and seq.padding_mask is not None:
        mask = seq.padding_mask
    cut = [F.pad(t, (0, 0, 0, 0, 0, added)).unflatten(1, (block, -1)).transpose(1, 2) for t in parts]
    return cut, F.pad(mask, (0, added), value=True).unflatten(1, (-1, block))


def restored(y: Tensor, n: int) -> Tensor:
    """Strided blocks (b, nblocks, block, h, p) back as (b, n, h, p)."""
    return y.transpose(1, 2).flatten(1, 2)[:, :n]
