"""A transformer block that some layers of a stack share, each with a small part of its own, as in Zamba."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from seqlib.errors import ConfigError
from seqlib.fields import from_fields
from seqlib.layers.init import fill_, linear_
from seqlib.layers.linear import Linear
from seqlib.layers.mlp import ACTIVATIONS
from seqlib.layers.norm import RMSNorm
from seqlib.mixers.attention import Attention, AttentionConfig
from seqlib.ops.attention import KVState
from seqlib.sequence import SequenceInfo, State

__all__ = ["Aside", "AsideConfig", "AsideState", "AsideUse", "LowRank"]


@dataclass(frozen=True, kw_only=True)
class AsideConfig:
    """The blocks that layers with `BlockConfig.aside` take in turns."""

    attention: AttentionConfig = AttentionConfig()  # noqa: RUF009 - frozen
    """Attention over twice the width of the stream."""
    d_mlp: int
    activation: str = "gelu"
    bias: bool = False
    """Biases of the MLP."""
    copies: int = 1
    """Different blocks; the n-th layer that has one uses number n mod copies."""
    rank: int = 128
    """Rank of what each layer adds to the MLP's first projection."""
    attention_adapters: bool = False
    """The same for the projections to q, k and v."""

    def __post_init__(self) -> None:
        if isinstance(self.attention, Mapping):
            object.__setattr__(self, "attention", from_fields(AttentionConfig, self.attention, "aside: attention"))
        if self.activation not in ACTIVATIONS or min(self.d_mlp, self.copies, self.rank) < 1:
            raise ConfigError(f"aside: unknown activation or sizes below 1: {self}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return plain | {"attention": self.attention.to_dict()}


@dataclass
class AsideState(State):
    """The keys and values of a layer's use of a shared block, and the state of its mixer."""

    kv: KVState
    mixer: State


class Aside(nn.Module):
    """Attention over (x, e) and an MLP, one after the other, without residuals; e is what the stack began with.

        a = attention(norm([x, e]));   y = down_proj(act(gate) * up),   gate, up = in_proj(mlp_norm(a))

    Source: Glorioso et al. 2024 (Zamba2, arXiv 2411.15242), section 2; Zyphra/Zamba2.
    """

    def __init__(self, config: AsideConfig, d_model: int, eps: float, offset: float) -> None:
        super().__init__()
        self.norm = RMSNorm(2 * d_model, eps, offset)
        self.attention = Attention(dataclasses.replace(config.attention, d_out=d_model), 2 * d_model)
        self.mlp_norm = RMSNorm(d_model, eps, offset)
        self.activation = ACTIVATIONS[config.activation]
        self.in_proj = Linear(d_model, 2 * config.d_mlp, bias=config.bias)
        self.down_proj = Linear(config.d_mlp, d_model, bias=config.bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        linear_(self.in_proj)
        linear_(self.down_proj)


class AsideUse(nn.Module):
    """What one layer adds: low-rank changes of the shared projections, and the way out of the block.

    The result is added to what the layer's mixer reads, not to the stream.
    """

    def __init__(self, config: AsideConfig, d_model: int) -> None:
        super().__init__()
        attention, self.qkv = config.attention, nn.ModuleList()
        if config.attention_adapters:
            nheads = attention.nheads or 1
            headdim = attention.headdim or 2 * d_model // nheads
            widths = (nheads, *[attention.nheads_kv or nheads] * 2)
            self.qkv.extend(LowRank(2 * d_model, config.rank, count * headdim) for count in widths)
        self.mlp = LowRank(d_model, config.rank, 2 * config.d_mlp)
        self.out_proj = Linear(d_model, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        linear_(self.out_proj)

    def forward(
        self, x: Tensor, first: Tensor, block: Aside, state: KVState | None, seq: SequenceInfo | None
    ) -> tuple[Tensor, KVState]:
        h, qkv = self._project(x, first, block)
        y, state = block.attention.attend(h, qkv, state, seq)
        return self._mlp(y, block), state

    def step(self, x: Tensor, first: Tensor, block: Aside, state: KVState) -> tuple[Tensor, KVState]:
        h, qkv = self._project(x[:, None], first[:, None], block)
        y, state = block.attention.attend_step(h[:, 0], qkv, state.writable())
        return self._mlp(y, block), state

    def _project(self, x: Tensor, first: Tensor, block: Aside) -> tuple[Tensor, tuple[Tensor, ...]]:
        h = block.norm(torch.cat([x, first], -1))
        qkv = block.attention.project(h)
        return h, tuple(t + change(h) for t, change in zip(qkv, self.qkv)) if len(self.qkv) else qkv

    def _mlp(self, y: Tensor, block: Aside) -> Tensor:
        h = block.mlp_norm(y)
        gate, up = (block.in_proj(h) + self.mlp(h)).chunk(2, -1)
        return self.out_proj(block.down_proj(block.activation(gate) * up))


class LowRank(nn.Module):
    """b(a(x)); b starts at 0."""

    def __init__(self, d_in: int, rank: int, d_out: int) -> None:
        super().__init__()
        self.a = Linear(d_in, rank, bias=False)
        self.b = Linear(rank, d_out, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        linear_(self.a)
        fill_(self.b.weight, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))
