"""One layer of a backbone: norm, mixer, add, and where configured norm, MLP, add."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from seqlib.layers.moe import channel_mixer
from seqlib.layers.norm import RMSNorm
from seqlib.mixers import build_mixer
from seqlib.mixers.base import without_gradients
from seqlib.models.aside import AsideState, AsideUse
from seqlib.models.config import BackboneConfig
from seqlib.sequence import SequenceInfo, State

__all__ = ["Block"]


class Block(nn.Module):
    """x = x + mixer(norm(x));  x = x + mlp(norm(x)).    `BlockConfig` moves the norms and scales what is added.

    The residual stream x may be wider than the parameters (float32 beside bfloat16); the norms step down to theirs.
    """

    def __init__(self, config: BackboneConfig, layer_index: int) -> None:
        super().__init__()
        mixer = config.mixers[config.layer_pattern[layer_index]]
        self.block = config.block(layer_index)
        mlp = self.block.mlp
        self.norm = RMSNorm(config.d_model, config.norm_eps, config.norm_offset)
        self.use: AsideUse | None = None
        if self.block.aside and config.aside is not None:
            self.use = AsideUse(config.aside, config.d_model)
        branches = 1 if mlp is None else 2
        self.mixer = build_mixer(mixer, config.d_model, layer_index, config.n_layer, branches=branches)
        if not self.mixer.reads_input and self.block.norm == "pre":
            self.norm.requires_grad_(False)  # nothing reaches it, which data-parallel training would wait for
        scaled = self.block.mixer_skip != 1 or self.block.mixer_scale != 1
        self.plain = self.use is None and self.block.norm == "pre" and not scaled and not self.mixer.takes_residual
        self.mlp_norm: RMSNorm | None = None
        self.mlp: nn.Module | None = None
        if mlp is not None:
            self.mlp_norm = RMSNorm(config.d_model, config.norm_eps, config.norm_offset)
            self.mlp = channel_mixer(mlp, config.d_model, residual_scale=self.mixer.residual_scale)

    def forward(
        self, x: Tensor, state: Any, seq: SequenceInfo | None, first: Any = None, block: Any = None
    ) -> tuple[Tensor, State]:
        """`first` and `block`: what the stack began with and the `Aside`, for layers that use one."""
        if self.use is None:
            x, inner = self._enter(x, self.norm)
            y, after = self.mixer(inner, state, seq, **self._residual(x))
        else:
            kv, before = (None, None) if state is None else (state.kv, state.mixer)
            aside, kv = self.use(x, first, block, kv, seq)
            y, after = self.mixer(self.norm(x + aside), before, seq, **self._residual(x))
            after = AsideState(kv, after)
        return self._mlp(self._mixed(x, y)), after

    @without_gradients
    def step(self, x: Tensor, state: Any, first: Any = None, block: Any = None) -> tuple[Tensor, State]:
        if self.plain:
            x, state = self.mixer.added_step(x, self.norm, state)
            return self._mlp(x), state
        if self.use is None:
            x, inner = self._enter(x, self.norm)
            y, state = self.mixer.step(inner, state, **self._residual(x))
        else:
            aside, state.kv = self.use.step(x, first, block, state.kv)
            y, state.mixer = self.mixer.step(self.norm(x + aside), state.mixer, **self._residual(x))
        return self._mlp(self._mixed(x, y)), state

    def _mixed(self, x: Tensor, y: Tensor) -> Tensor:
        return self._leave(x, y, self.norm, self.block.mixer_skip, self.block.mixer_scale)

    def _residual(self, x: Tensor) -> dict[str, Tensor]:
        return {"residual": x} if self.mixer.takes_residual else {}

    def _mlp(self, x: Tensor) -> Tensor:
        if self.mlp is None or self.mlp_norm is None:
            return x
        x, inner = self._enter(x, self.mlp_norm)
        return self._leave(x, self.mlp(inner), self.mlp_norm, self.block.mlp_skip, self.block.mlp_scale)

    def _enter(self, x: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        """What a branch is added to, and what it reads."""
        if self.block.norm == "post":
            return x, x.to(norm.weight.dtype)
        inner = norm(x)
        return (inner.to(x.dtype) if self.block.norm == "stream" else x), inner

    def _leave(self, x: Tensor, y: Tensor, norm: RMSNorm, skip: float, scale: float) -> Tensor:
        y = norm(y) if self.block.norm == "post" else y
        return (x if skip == 1 else skip * x) + (y if scale == 1 else scale * y)
