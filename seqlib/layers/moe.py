"""Mixture of experts: a channel mixer in which every token passes through a few of many MLPs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqlib.context import batched
from seqlib.errors import ConfigError
from seqlib.fields import from_fields
from seqlib.layers.init import fill_, linear_, uniform_
from seqlib.layers.linear import Linear
from seqlib.layers.mlp import ACTIVATIONS, MLP, MLPConfig
from seqlib.ops.linear import FEW_ROWS, linear
from seqlib.ops.linear.torch_impl import product

__all__ = ["MoE", "MoEConfig", "balance_loss", "channel_config", "channel_mixer"]


@dataclass(frozen=True, kw_only=True)
class MoEConfig(MLPConfig):
    """Experts and their router; `d_mlp`, `gated` and `activation` describe one expert."""

    nexperts: int = 8
    top_k: int = 2
    """Experts per token."""
    score: str = "softmax"
    """"softmax" over all experts, "chosen_softmax" over the chosen ones only, or "sigmoid" of each."""
    normalize: bool = True
    """Divide the chosen scores by their sum."""
    scale: float = 1.0
    """Factor of the weights of the routed experts."""
    choice_bias: bool = False
    """A bias per expert that moves the choice and not the weights; it has no gradient (DeepSeek-V3)."""
    ngroups: int = 1
    """Groups of experts: first the `top_groups` with the largest sum of two scores, then experts within those."""
    top_groups: int = 1
    d_shared: int | None = None
    """Width of an expert that every token passes through besides; None for none."""
    shared_gate: bool = False
    """Weigh it by sigmoid(shared_gate(x)) instead of 1."""
    d_latent: int | None = None
    """Routed experts work on a projection to this width; None is d_model."""
    balance: float = 0.0
    """Weight of the load-balancing loss, whose gradient is added in the backward pass (see `balance_loss`)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score not in ("softmax", "chosen_softmax", "sigmoid"):
            raise ConfigError(f"moe: score must be 'softmax', 'chosen_softmax' or 'sigmoid', got {self.score!r}")
        if not 1 <= self.top_k <= self.nexperts:
            raise ConfigError(f"moe: need 1 <= top_k <= nexperts, got {self.top_k} and {self.nexperts}")
        for name in ("d_shared", "d_latent"):
            width = getattr(self, name)
            if width is not None and width < 1:
                raise ConfigError(f"moe: {name} must be positive, got {width}")
        if self.ngroups < 1 or self.nexperts % self.ngroups or not 1 <= self.top_groups <= self.ngroups:
            raise ConfigError(
                f"moe: ngroups must divide nexperts={self.nexperts} and 1 <= top_groups <= ngroups, got {self.ngroups} "
                f"and {self.top_groups}"
            )
        if self.bias or self.gate_scale != 1:
            raise ConfigError("moe: experts have no bias and no gate_scale")


class MoE(nn.Module):
    """Top-k routed experts, with an expert for all tokens beside them where configured.

        s = score(router(x));  K = top_k of s (+ choice_bias);  w = scale * s_K / sum s_K
        y = sum_{e in K} w_e expert_e(x) + shared(x);   expert(x) = down(act(gate(x)) * up(x))

    Rows of `in_weight` are gate, up. Scores are float32.

    Source: Shazeer et al. 2017 (arXiv 1701.06538); groups and choice bias as in DeepSeek-V3 (arXiv 2412.19437),
    section 2.1.2.
    """

    def __init__(self, config: MoEConfig, d_model: int, *, residual_scale: float = 1.0) -> None:
        super().__init__()
        c, self.config, self.residual_scale = config, config, residual_scale
        d, width = c.d_latent or d_model, c.width(d_model)
        self.activation = ACTIVATIONS[c.activation]
        self.router = Linear(d_model, c.nexperts, bias=False)
        self.choice_bias = nn.Parameter(torch.empty(c.nexperts), requires_grad=False) if c.choice_bias else None
        self.in_weight = nn.Parameter(torch.empty(c.nexperts, (1 + c.gated) * width, d))
        self.out_weight = nn.Parameter(torch.empty(c.nexperts, d, width))
        self.latent_in = Linear(d_model, d, bias=False) if c.d_latent else None
        self.latent_out = Linear(d, d_model, bias=False) if c.d_latent else None
        shared = MLPConfig(d_mlp=c.d_shared, gated=c.gated, activation=c.activation)
        self.shared = MLP(shared, d_model, residual_scale=residual_scale) if c.d_shared else None
        self.shared_gate = Linear(d_model, 1, bias=False) if c.shared_gate else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for layer in (self.router, self.latent_in, self.latent_out, self.shared_gate):
            if layer is not None:
                linear_(layer)
        if self.choice_bias is not None:
            fill_(self.choice_bias, 0.0)
        uniform_(self.in_weight, 1 / math.sqrt(self.in_weight.shape[-1]))
        uniform_(self.out_weight, self.residual_scale / math.sqrt(self.out_weight.shape[-1]))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        weights, chosen = self.route(tokens)
        routed = tokens if self.latent_in is None else self.latent_in(tokens)
        y = self._experts(routed, weights.to(x.dtype), chosen)
        y = y if self.latent_out is None else self.latent_out(y)
        if self.shared is not None:
            shared = self.shared(tokens)
            y = y + (shared if self.shared_gate is None else torch.sigmoid(self.shared_gate(tokens)) * shared)
        return y.view_as(x)

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Weights, float32, and numbers of the chosen experts, both (ntokens, top_k)."""
        c = self.config
        logits = self.router(tokens).to(torch.promote_types(tokens.dtype, torch.float32))
        scores = logits.sigmoid() if c.score == "sigmoid" else logits.softmax(-1)
        ranked = scores if self.choice_bias is None else scores + self.choice_bias
        if c.ngroups > 1:
            groups = ranked.unflatten(-1, (c.ngroups, -1))
            best = groups.topk(min(2, groups.shape[-1]), -1).values.sum(-1).topk(c.top_groups, -1).indices
            kept = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter(-1, best, True)
            ranked = groups.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(-2)
        chosen = ranked.topk(c.top_k, -1).indices
        if c.score == "chosen_softmax":
            weights = logits.gather(-1, chosen).softmax(-1)
        else:
            weights = scores.gather(-1, chosen)
            if c.normalize:
                weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        if c.balance and self.training and torch.is_grad_enabled():
            weights = _AddLoss.apply(weights, c.balance * balance_loss(scores, chosen))
        return weights * c.scale, chosen

    def _experts(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        if batched() or torch.compiler.is_exporting():  # who chose which expert cannot be looked at
            return self._all(x, weights, chosen)
        experts, order = chosen.flatten().sort()
        token = order // chosen.shape[1]
        # What torch's grouped product is made for: 16 bits, in rows of whole 16 bytes.
        whole = self.in_weight.shape[-1] % 8 == self.out_weight.shape[-1] % 8 == 0
        grouped = x.is_cuda and x.dtype == torch.bfloat16 and whole
        y = self._grouped(x[token], experts) if grouped else self._one_by_one(x[token], experts)
        return torch.zeros_like(x).index_add(0, token, y * weights.flatten()[order].unsqueeze(-1))

    def _grouped(self, x: Tensor, experts: Tensor) -> Tensor:
        """Rows of x, in order of their experts, each through its own; nothing waits for the device."""
        ends = torch.searchsorted(experts, torch.arange(self.config.nexperts, device=x.device), right=True).int()
        hidden = F.grouped_mm(x, self.in_weight.transpose(1, 2), offs=ends)
        return F.grouped_mm(self._activated(hidden), self.out_weight.transpose(1, 2), offs=ends)

    def _one_by_one(self, x: Tensor, experts: Tensor) -> Tensor:
        """The same, expert by expert; reads the weights of chosen ones only."""
        used, counts = experts.unique_consecutive(return_counts=True)
        parts = []
        for expert, rows in zip(used.tolist(), x.split(counts.tolist())):
            by = linear if rows.shape[0] <= FEW_ROWS and not torch.is_grad_enabled() else product
            hidden = self._activated(by(rows, self.in_weight[expert], None))
            parts.append(by(hidden, self.out_weight[expert], None))
        return torch.cat(parts)

    def _all(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """The same, every token through all experts."""
        share = weights.new_zeros(len(x), self.config.nexperts).scatter_add(1, chosen, weights)
        hidden = self._activated(torch.einsum("td,ehd->teh", x, self.in_weight))
        return torch.einsum("teh,edh,te->td", hidden, self.out_weight, share)

    def _activated(self, hidden: Tensor) -> Tensor:
        if not self.config.gated:
            return self.activation(hidden)
        gate, up = hidden.chunk(2, -1)
        return self.activation(gate) * up


def balance_loss(scores: Tensor, chosen: Tensor) -> Tensor:
    """nexperts * sum_e f_e p_e: f_e the share of choices that fell on expert e, p_e its mean share of the scores.

    1 when all experts are chosen equally, nexperts / top_k at worst.

    Args:
        scores: (ntokens, nexperts), not negative.
        chosen: (ntokens, top_k) int64.

    Source: Fedus et al. 2022 (Switch Transformer, arXiv 2101.03961), eq. 4-6.
    """
    nexperts = scores.shape[-1]
    mean = (scores / scores.sum(-1, keepdim=True)).mean(0)
    share = F.one_hot(chosen, nexperts).to(mean.dtype).mean((0, 1))
    return nexperts * (share * mean).sum()


class _AddLoss(torch.autograd.Function):
    """x as it is; in the backward pass `loss` counts as if it had been added to the model's loss."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, loss: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], torch.ones_like(ctx.saved_tensors[0])


def channel_config(values: Mapping[str, Any] | MLPConfig | None) -> MLPConfig | None:
    """A typed config from plain values: of experts if they name `nexperts`, else of an MLP."""
    if values is None or isinstance(values, MLPConfig):
        return values
    if not isinstance(values, Mapping):
        raise ConfigError(f"mlp is a dict of fields, or null for none, got {values!r}")
    return from_fields(MoEConfig if "nexperts" in values else MLPConfig, values, "mlp config")


def channel_mixer(config: MLPConfig, d_model: int, *, residual_scale: float = 1.0) -> MLP | MoE:
    """The module that a config describes."""
    cls: Any = MoE if isinstance(config, MoEConfig) else MLP
    return cls(config, d_model, residual_scale=residual_scale)
