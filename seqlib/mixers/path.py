"""PaTH attention: positions that the tokens themselves make, as products of Householder maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqlib.layers.init import fill_, linear_
from seqlib.layers.linear import Linear, stored
from seqlib.layers.norm import RMSNorm, unit_length
from seqlib.layers.short_conv import ShortConv
from seqlib.layers.steps import project
from seqlib.mixers.base import Mixer, MixerConfig, positive, wide, wide_dtype
from seqlib.mixers.matrix import divide
from seqlib.ops import path_attention
from seqlib.ops.path_attention import PathState
from seqlib.ops.path_attention import step as path_step
from seqlib.sequence import SequenceInfo, State

__all__ = ["Path", "PathConfig", "PathMixerState"]


@dataclass(frozen=True, kw_only=True)
class PathConfig(MixerConfig):
    """Hyperparameters of `Path`; the defaults are those of fla."""

    kind: str = "path"
    nheads: int | None = None
    """None is d_model / headdim."""
    nheads_kv: int | None = None
    """Heads of keys, values and maps, each shared by nheads / nheads_kv neighbouring query heads; None is nheads."""
    headdim: int | None = None
    """None is d_model / nheads, or 64 where that is not given either."""
    w_rank: int | None = 32
    """Rank of the projection to w; None for a full one, as with few key heads."""
    d_conv: int = 3
    qk_norm: bool = False
    """RMSNorm of every query and key head."""
    qk_norm_eps: float = 1e-6
    forget_gate: bool = False
    """Lower scores by what every token and head forgets (PaTH-FoX)."""

    def __post_init__(self) -> None:
        positive(self, "nheads", "nheads_kv", "headdim", "w_rank", "d_conv")


@dataclass
class PathMixerState(State):
    """Rewritten keys, values, and the last inputs of the convolution (batch, d_conv - 1, nheads_kv * headdim)."""

    kv: PathState
    conv: Tensor


class Path(Mixer[PathConfig]):
    """PaTH attention.

        w = silu(causal_conv1d(w_proj(x))), of length 1 per head;   beta = 2 sigmoid(bt_proj(x))
        H_t = I - beta_t w_t^T w_t
        scores_ij = headdim^(-1/2) (q_i H_i ... H_{j+1} k_j^T + sum_{j<t<=i} logsigmoid(g_proj(x_t)))
        y = o_proj(softmax(scores) v)

    The gate (forget_gate) is scaled with the scores, as in the released code. State: `PathMixerState`; every token
    rewrites all keys, which are float32. Like other full caches it grows by itself, except in `step` on a GPU.

    Source: Yang et al. 2025 (PaTH, arXiv 2505.16381), sections 3 and 4; names as in fla, layers/path_attn.py, whose
    q and k norms this applies in decoding too.
    """

    Config: ClassVar[type[MixerConfig]] = PathConfig
    layer_type: ClassVar[str] = "full_attention"

    def __init__(self, config: PathConfig, d_model: int, **place: Any) -> None:
        super().__init__(config, d_model, **place)
        c = config
        self.nheads = c.nheads or divide(c.kind, "d_model", d_model, "headdim", c.headdim or 64)
        self.headdim = c.headdim or divide(c.kind, "d_model", d_model, "nheads", self.nheads)
        self.nheads_kv = c.nheads_kv or self.nheads
        divide(c.kind, "nheads", self.nheads, "nheads_kv", self.nheads_kv)
        inner, inner_kv = self.nheads * self.headdim, self.nheads_kv * self.headdim
        self.q_proj = Linear(d_model, inner, bias=False)
        self.k_proj = Linear(d_model, inner_kv, bias=False)
        self.v_proj = Linear(d_model, inner_kv, bias=False)
        self.w_proj: nn.Module = (
            nn.Sequential(Linear(d_model, c.w_rank, bias=False), Linear(c.w_rank, inner_kv, bias=False))
            if c.w_rank
            else Linear(d_model, inner_kv, bias=False)
        )
        self.w_conv1d = ShortConv(inner_kv, c.d_conv, bias=False)
        self.bt_proj = Linear(d_model, self.nheads_kv)
        self.g_proj = Linear(d_model, self.nheads) if c.forget_gate else None
        self.q_norm = RMSNorm(self.headdim, c.qk_norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(self.headdim, c.qk_norm_eps) if c.qk_norm else None
        self.o_proj = Linear(inner, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for layer in self.modules():
            if isinstance(layer, Linear):
                linear_(layer, self.residual_scale if layer is self.o_proj else 1.0)
                if layer.bias is not None:
                    fill_(layer.bias, 0.0)
            elif isinstance(layer, (ShortConv, RMSNorm)):
                layer.reset_parameters()

    def forward(
        self, x: Tensor, state: PathMixerState | None = None, seq: SequenceInfo | None = None
    ) -> tuple[Tensor, PathMixerState]:
        self.check(x, seq)
        w, conv = self.w_conv1d(self._before_conv(x), None if state is None else state.conv, seq)
        before = None if state is None else state.kv
        y, kv = path_attention(
            *self._heads(x, w, before), self._log_decay(x), state=before, seq=seq,
            backend=self.backend("path_attention"),
        )  # fmt: skip
        return self.o_proj(y.flatten(2).to(x.dtype)), PathMixerState(kv, conv)

    def step(self, x: Tensor, state: PathMixerState) -> tuple[Tensor, PathMixerState]:
        kv = state.kv
        looks = x.device.type == "cpu" and not torch.compiler.is_compiling()
        if looks and int(kv.length.max()) >= kv.capacity:
            kv = state.kv = kv.reserve(max(16, 2 * kv.capacity))
        w = self.w_conv1d.step(self._before_conv(x), state.conv)
        y = path_step(*self._heads(x, w, kv), kv, self._log_decay(x))
        return self.o_proj(y.flatten(1).to(x.dtype)), state

    def _before_conv(self, x: Tensor) -> Tensor:
        # Under autocast the projection is narrower than the state that its last rows go into.
        return self.w_proj(x).to(self.w_conv1d.weight.dtype)

    def _heads(self, x: Tensor, w: Tensor, kv: PathState | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q, k, v in the dtype of the state where there is one, w and beta in float32."""
        q, k, v, beta = project(x, self.q_proj, self.k_proj, self.v_proj, self.bt_proj)
        q, k, v = (t.unflatten(-1, (-1, self.headdim)) for t in (q, k, v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        w = unit_length(wide(w).unflatten(-1, (-1, self.headdim)))
        dtype = v.dtype if kv is None else kv.v.dtype
        return q.to(dtype), k.to(dtype), v.to(dtype), w, 2 * torch.sigmoid(wide(beta))

    def _log_decay(self, x: Tensor) -> Tensor | None:
        return None if self.g_proj is None else F.logsigmoid(wide(self.g_proj(x))) * self.headdim**-0.5

    def initial_state(
        self,
        batch: int,
        max_seqlen: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> PathMixerState:
        weight = stored(self.k_proj, self)
        kv = PathState.empty(
            batch,
            max_seqlen or 0,
            self.nheads_kv,
            self.headdim,
            nheads_decay=self.nheads if self.config.forget_gate else 0,
            dtype=dtype or weight.dtype,
            device=device or weight.device,
        )
        return PathMixerState(kv, self.w_conv1d.initial_state(batch, device, dtype))

    def state_bytes(self, batch: int, seqlen: int) -> int:
        weight = stored(self.k_proj, self)
        wide_size, inner_kv = wide_dtype(weight).itemsize, self.nheads_kv * self.headdim
        token = inner_kv * (wide_size + weight.element_size())
        token += self.nheads * wide_size if self.config.forget_gate else 0
        conv = (self.config.d_conv - 1) * inner_kv * weight.element_size()
        return batch * (seqlen * token + torch.long.itemsize + conv)
