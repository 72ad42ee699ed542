"""Softmax attention, full or over a sliding window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlib.errors import ConfigError, UnsupportedInput
from seqlib.layers.init import fill_, linear_
from seqlib.layers.linear import Linear, stored
from seqlib.layers.norm import RMSNorm
from seqlib.layers.positions import positions
from seqlib.layers.rotary import Rotary
from seqlib.layers.steps import project
from seqlib.mixers.base import Mixer, MixerConfig, positive, wide, wide_dtype, within
from seqlib.ops import attention
from seqlib.ops.attention import KVState
from seqlib.ops.attention import step as attention_step
from seqlib.sequence import SequenceInfo

__all__ = ["Attention", "AttentionConfig", "SlidingAttention", "SlidingAttentionConfig"]


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(MixerConfig):
    """Hyperparameters of `Attention`."""

    kind: str = "attention"
    nheads: int | None = None
    """None is d_model / headdim."""
    nheads_kv: int | None = None
    """Heads of keys and values, each shared by nheads / nheads_kv neighbouring query heads; None is nheads."""
    headdim: int | None = None
    """None is d_model / nheads, or 64 where that is not given either."""
    window: int | None = None
    """Tokens that are seen, the current one included; None for all."""
    causal: bool = True
    """False sees the whole sequence; such a layer has no state to go on from."""
    scale: float | None = None
    """Factor of the scores; None is 1/sqrt(headdim)."""
    d_out: int | None = None
    """Width of the output where it is not d_model, which only a part of something else may have."""
    bias: bool = False
    """Biases of the projections to q, k and v."""
    out_bias: bool | None = None
    """Bias of the output projection; None is the same as `bias`."""
    gate: bool = False
    """Multiply what is read by sigmoid(gate_proj(x)), before the output projection."""
    qk_norm: bool = False
    """RMSNorm of every query and key head, before the rotation."""
    qk_norm_eps: float = 1e-6
    qk_norm_offset: float = 0.0
    """That norm multiplies by its weight plus this."""
    qk_norm_joint: bool = False
    """One norm over all heads together instead."""
    rotary: bool = True
    rope_theta: float = 10000.0
    rotary_fraction: float = 1.0
    """Part of each head that is rotated."""
    rotary_interleaved: bool = False
    """Rotate neighbouring features instead of the two halves."""
    rope_scaling: float | None = None
    """Stretches positions linearly."""
    forget_gate: bool = False
    """Lower scores by what every token and head forgets (FoX); the published model then has rotary=False."""

    def __post_init__(self) -> None:
        positive(self, "nheads", "nheads_kv", "headdim", "window", "d_out")
        within(self, 0, 1, "rotary_fraction")
        if self.forget_gate and not self.causal:
            raise ConfigError(f"{self.kind}: forget_gate says what later tokens forget and needs causal=True")


@dataclass(frozen=True, kw_only=True)
class SlidingAttentionConfig(AttentionConfig):
    """Hyperparameters of `SlidingAttention`."""

    kind: str = "sliding_attention"
    window: int | None = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is None:
            raise ConfigError("sliding_attention: window must be a positive integer; use kind 'attention' for none")


class Attention(Mixer[AttentionConfig]):
    """Softmax attention with grouped heads and rotary positions.

        q, k, v = q_proj(x), k_proj(x), v_proj(x);  q, k = rotary(rms_norm(q)), rotary(rms_norm(k))
        y = o_proj(attention(q, k, v))
        with gate: o_proj(attention(q, k, v) * sigmoid(gate_proj(x)));  with forget_gate: the op's log_decay is
        logsigmoid(f_proj(x))

    Positions count the real tokens of a document. State: `KVState` in the dtype of k and v, a ring when windowed.
    A full cache grows by itself, except in `step` on a GPU, where nobody may wait to see whether it is full: make it
    with `initial_state(batch, max_seqlen)`.

    Source: Vaswani et al. 2017 (arXiv 1706.03762); rotary: Su et al. 2021; grouped heads: Ainslie et al. 2023
    (arXiv 2305.13245); names of the projections as in the LLaMA family of transformers. Forget gate: Lin et al. 2025
    (arXiv 2503.02130), eq. 4-6, FoX (LLaMA); `f_proj` as in fla, layers/forgetting_attn.py.
    """

    Config: ClassVar[type[MixerConfig]] = AttentionConfig
    supports: ClassVar[frozenset[str]] = frozenset({"packed", "padded", "initial_state", "bidirectional"})
    layer_type: ClassVar[str] = "full_attention"
    relu: bool = False
    """Whether scores are rectified in place of the softmax; set by subclasses."""

    def __init__(self, config: AttentionConfig, d_model: int, **place: Any) -> None:
        super().__init__(config, d_model, **place)
        self.nheads = config.nheads or _divide(config, "d_model", d_model, "headdim", config.headdim or 64)
        self.headdim = config.headdim or _divide(config, "d_model", d_model, "nheads", self.nheads)
        self.nheads_kv = config.nheads_kv or self.nheads
        _divide(config, "nheads", self.nheads, "nheads_kv", self.nheads_kv)
        inner, inner_kv = self.nheads * self.headdim, self.nheads_kv * self.headdim
        out_bias = config.bias if config.out_bias is None else config.out_bias
        self.q_proj = Linear(d_model, inner, bias=config.bias)
        self.k_proj = Linear(d_model, inner_kv, bias=config.bias)
        self.v_proj = Linear(d_model, inner_kv, bias=config.bias)
        self.o_proj = Linear(inner, config.d_out or d_model, bias=out_bias)
        self.gate_proj = Linear(d_model, inner, bias=config.bias) if config.gate else None
        self.f_proj = Linear(d_model, self.nheads) if config.forget_gate else None
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            widths = (inner, inner_kv) if config.qk_norm_joint else (self.headdim,) * 2
            self.q_norm, self.k_norm = (RMSNorm(d, config.qk_norm_eps, config.qk_norm_offset) for d in widths)
        self.rotary = (
            Rotary(
                self.headdim,
                config.rope_theta,
                config.rotary_fraction,
                config.rotary_interleaved,
                config.rope_scaling,
            )
            if config.rotary
            else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.gate_proj):
            if projection is not None:
                linear_(projection)
        linear_(self.o_proj, self.residual_scale)
        if self.f_proj is not None:
            linear_(self.f_proj)
            fill_(self.f_proj.bias, 0.0)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.reset_parameters()

    def forward(
        self, x: Tensor, state: KVState | None = None, seq: SequenceInfo | None = None
    ) -> tuple[Tensor, KVState]:
        self.check(x, seq)
        return self.attend(x, self.project(x), state, seq)

    def step(self, x: Tensor, state: KVState) -> tuple[Tensor, KVState]:
        return self.attend_step(x, self.project(x[:, None]), state)

    def attend(
        self, x: Tensor, qkv: tuple[Tensor, ...], state: KVState | None, seq: SequenceInfo | None
    ) -> tuple[Tensor, KVState]:
        q, k, v = self._heads(qkv, x, state, seq)
        c = self.config
        y, state = attention(
            q, k, v, self._log_decay(x), window=c.window, causal=c.causal, scale=c.scale, relu=self.relu,
            state=state, seq=seq, backend=self.backend("attention"),
        )  # fmt: skip
        return self._out(y, x), state

    def attend_step(self, x: Tensor, qkv: tuple[Tensor, ...], state: KVState) -> tuple[Tensor, KVState]:
        if not self.config.causal:
            raise UnsupportedInput(f"{self.config.kind} with causal=False cannot decode token by token")
        looks = x.device.type == "cpu" and not torch.compiler.is_compiling()
        if looks and self.config.window is None and int(state.length.max()) >= state.capacity:
            state = state.reserve(max(16, 2 * state.capacity))
        q, k, v = (t.squeeze(1) for t in self._heads(qkv, x[:, None], state, None))
        c = self.config
        y = attention_step(q, k, v, state, self._log_decay(x), window=c.window, scale=c.scale, relu=self.relu)
        return self._out(y, x), state

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        return project(x, self.q_proj, self.k_proj, self.v_proj)

    def _heads(
        self, qkv: tuple[Tensor, ...], x: Tensor, state: KVState | None, seq: SequenceInfo | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (batch, seqlen, heads, headdim), rotated, in the dtype of the state where there is one."""
        q, k, v = qkv
        if self.q_norm is not None and self.k_norm is not None:
            q, k = (
                norm(t if self.config.qk_norm_joint else t.unflatten(-1, (-1, self.headdim))).view_as(t)
                for norm, t in ((self.q_norm, q), (self.k_norm, k))
            )
        q, k, v = (t.unflatten(-1, (-1, self.headdim)) for t in (q, k, v))
        if self.rotary is not None:
            q, k = self.rotary(positions(x, None if state is None else state.length, seq), q, k)
        dtype = v.dtype if state is None else state.k.dtype
        return q.to(dtype), k.to(dtype), v.to(dtype)

    def _out(self, y: Tensor, x: Tensor) -> Tensor:
        y = y.flatten(-2).to(x.dtype)
        return self.o_proj(y if self.gate_proj is None else y * torch.sigmoid(self.gate_proj(x)))

    def _log_decay(self, x: Tensor) -> Tensor | None:
        return None if self.f_proj is None else F.logsigmoid(wide(self.f_proj(x)))

    def initial_state(
        self,
        batch: int,
        max_seqlen: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> KVState:
        weight = stored(self.k_proj, self)
        return KVState.empty(
            batch,
            self.config.window or max_seqlen or 0,
            self.nheads_kv,
            self.headdim,
            nheads_decay=self.nheads if self.config.forget_gate else 0,
            dtype=dtype or weight.dtype,
            device=device or weight.device,
        )

    def state_bytes(self, batch: int, seqlen: int) -> int:
        capacity = self.config.window or seqlen
        weight = stored(self.k_proj, self)
        token = 2 * self.nheads_kv * self.headdim * weight.element_size()
        if self.config.forget_gate:
            token += self.nheads * wide_dtype(weight).itemsize
        return batch * (capacity * token + torch.long.itemsize)


class SlidingAttention(Attention):
    """`Attention` over a window: a state of fixed size and work linear in the sequence.

    Source: Beltagy et al. 2020 (arXiv 2004.05150); the causal window as in Mistral 7B, Jiang et al. 2023 (arXiv
    2310.06825).
    """

    Config: ClassVar[type[MixerConfig]] = SlidingAttentionConfig
    layer_type: ClassVar[str] = "sliding_attention"


def _divide(config: AttentionConfig, whole: str, width: int, part: str, size: int) -> int:
    if width % size:
        raise ConfigError(f"{config.kind}: {part} must divide {whole}={width}, got {size}")
    return width // size
