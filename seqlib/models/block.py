"""One layer of a backbone: norm, mixer, add, and where configured norm, MLP, add."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from seqlib.layers.mlp import MLP
from seqlib.layers.norm import RMSNorm
from seqlib.mixers import build_mixer
from seqlib.models.config import BackboneConfig
from seqlib.sequence import SequenceInfo, State

__all__ = ["Block"]


class Block(nn.Module):
    """x = x + mixer(norm(x));  x = x + mlp(norm(x)).

    The residual stream x may be wider than the parameters (float32 beside bfloat16); the norms step down to theirs.
    """

    def __init__(self, config: BackboneConfig, layer_index: int) -> None:
        super().__init__()
        mixer = config.mixers[config.layer_pattern[layer_index]]
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = build_mixer(mixer, config.d_model, layer_index, config.n_layer, branches=config.branches)
        self.mlp_norm: RMSNorm | None = None
        self.mlp: MLP | None = None
        if config.mlp is not None:
            self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
            self.mlp = MLP(config.mlp, config.d_model, residual_scale=self.mixer.residual_scale)

    def forward(self, x: Tensor, state: State | None, seq: SequenceInfo | None) -> tuple[Tensor, State]:
        y, state = self.mixer(self.norm(x), state, seq, **self._residual(x))
        return self._mlp(x + y), state

    @torch.no_grad()
    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        y, state = self.mixer.step(self.norm(x), state, **self._residual(x))
        return self._mlp(x + y), state

    def _residual(self, x: Tensor) -> dict[str, Tensor]:
        return {"residual": x} if self.mixer.takes_residual else {}

    def _mlp(self, x: Tensor) -> Tensor:
        return x if self.mlp is None or self.mlp_norm is None else x + self.mlp(self.mlp_norm(x))
