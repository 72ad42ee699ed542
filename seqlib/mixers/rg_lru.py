"""RG-LRU: a gated linear recurrent unit with a real state per channel, the recurrent block of Griffin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqlib.layers.init import fill_, linear_, normal_
from seqlib.layers.linear import Linear
from seqlib.layers.positions import advance, positions
from seqlib.layers.short_conv import ShortConv
from seqlib.mixers.base import Mixer, MixerConfig, positive, wide, wide_dtype
from seqlib.mixers.matrix import divide
from seqlib.ops import linear_scan
from seqlib.sequence import SequenceInfo, State

__all__ = ["RGLRU", "RGLRUConfig", "RGLRUState"]

_C = 8.0
_MAX_SLOPE = 1000.0


@dataclass(frozen=True, kw_only=True)
class RGLRUConfig(MixerConfig):
    """Hyperparameters of `RGLRU`; the defaults are those of RecurrentGemma."""

    kind: str = "rg_lru"
    d_inner: int | None = None
    """Width of the recurrence; None is d_model."""
    nheads: int = 10
    """Blocks of the block-diagonal gates."""
    d_conv: int = 4

    def __post_init__(self) -> None:
        positive(self, "d_inner", "nheads", "d_conv")


@dataclass
class RGLRUState(State):
    """conv: (batch, d_conv - 1, d_inner), the last inputs; state: (batch, d_inner), float32; length: (batch,) int64."""

    conv: Tensor
    state: Tensor
    length: Tensor


class RGLRU(Mixer[RGLRUConfig]):
    """The recurrent block of Griffin.

        x, y = in_proj(u);  x = causal_conv1d(x)
        i, r = sigmoid(input_gate(x)), sigmoid(decay_gate(x)), block diagonal
        a_t = exp(-8 r_t softplus(decay));  h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t x_t;  h_0 = i_0 x_0
        out = out_proj(h * gelu(y))

    exp(-softplus(decay)) starts uniform in area in the ring [0.9, 0.999].

    Source: De et al. 2024 (Griffin, arXiv 2402.19427), section 2.4; google-deepmind/recurrentgemma, torch/layers.py,
    where the slope of the root is bounded too.
    """

    Config: ClassVar[type[MixerConfig]] = RGLRUConfig

    def __init__(self, config: RGLRUConfig, d_model: int, **place: Any) -> None:
        super().__init__(config, d_model, **place)
        self.d_inner = config.d_inner or d_model
        width = divide(config.kind, "d_inner", self.d_inner, "nheads", config.nheads)
        self.in_proj = Linear(d_model, 2 * self.d_inner)
        self.conv1d = ShortConv(self.d_inner, config.d_conv, activation=None)
        self.input_gate = nn.Parameter(torch.empty(config.nheads, width, width))
        self.input_gate_bias = nn.Parameter(torch.empty(config.nheads, width))
        self.decay_gate = nn.Parameter(torch.empty(config.nheads, width, width))
        self.decay_gate_bias = nn.Parameter(torch.empty(config.nheads, width))
        self.decay = nn.Parameter(torch.empty(self.d_inner))
        self.out_proj = Linear(self.d_inner, d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        linear_(self.in_proj)
        self.conv1d.reset_parameters()
        for gate in (self.input_gate, self.decay_gate):
            normal_(gate, gate.shape[1] ** -0.5)
        for bias in (self.input_gate_bias, self.decay_gate_bias):
            fill_(bias, 0.0)
        square = torch.rand(self.d_inner, device=self.decay.device) * (0.999**2 - 0.9**2) + 0.9**2
        fill_(self.decay, torch.expm1(-0.5 * square.log()).log())
        linear_(self.out_proj, self.residual_scale)

    def param_groups(self) -> list[tuple[list[str], dict[str, Any]]]:
        return [(["decay"], {"weight_decay": 0.0})]

    def forward(
        self, x: Tensor, state: RGLRUState | None = None, seq: SequenceInfo | None = None
    ) -> tuple[Tensor, RGLRUState]:
        self.check(x, seq)
        x, y = self.in_proj(x).chunk(2, -1)
        before, h, length = (None, None, None) if state is None else (state.conv, state.state, state.length)
        x, conv = self.conv1d(x, before, seq)
        a, b = self._recurrence(x, positions(x, length, seq) == 0)
        scanned, h = linear_scan(a, b, initial_state=h, seq=seq, backend=self.backend("linear_scan"))
        return self._out(scanned, y), RGLRUState(conv, h, advance(x, length, seq))

    def step(self, x: Tensor, state: RGLRUState) -> tuple[Tensor, RGLRUState]:
        x, y = self.in_proj(x).chunk(2, -1)
        a, b = self._recurrence(self.conv1d.step(x, state.conv), state.length == 0)
        state.state.mul_(a).add_(b)
        state.length += 1
        return self._out(state.state, y), state

    def _recurrence(self, x: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """Decays and inputs of the scan, from x (..., d_inner) and where a document begins (...)."""
        heads = x.unflatten(-1, (self.config.nheads, -1))
        gates = ((self.input_gate, self.input_gate_bias), (self.decay_gate, self.decay_gate_bias))
        into, decay = (
            torch.sigmoid(wide(torch.einsum("...hi,hio->...ho", heads, w) + b)).flatten(-2) for w, b in gates
        )
        log_a = -_C * decay * F.softplus(wide(self.decay))
        first = first.unsqueeze(-1)
        # Nothing comes before the first token, so it is neither decayed nor scaled.
        scale = _Root.apply(-torch.expm1(2 * log_a)).masked_fill(first, 1.0)
        return log_a.exp().masked_fill(first, 0.0), scale * into * wide(x)

    def _out(self, h: Tensor, y: Tensor) -> Tensor:
        return self.out_proj(h.to(y.dtype) * F.gelu(y, approximate="tanh"))

    def initial_state(
        self,
        batch: int,
        max_seqlen: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> RGLRUState:
        device = device or self.decay.device
        h = torch.zeros(batch, self.d_inner, dtype=wide_dtype(self.decay), device=device)
        length = torch.zeros(batch, dtype=torch.long, device=device)
        return RGLRUState(self.conv1d.initial_state(batch, device, dtype), h, length)

    def state_bytes(self, batch: int, seqlen: int) -> int:
        conv = (self.config.d_conv - 1) * self.conv1d.weight.element_size()
        return batch * (self.d_inner * (conv + wide_dtype(self.decay).itemsize) + torch.long.itemsize)


class _Root(torch.autograd.Function):
    """sqrt(x), whose slope is infinite at 0, with a bounded one."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sqrt()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * _slope(*ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return tangents[0] * _slope(*ctx.saved_tensors)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None], x: Tensor) -> tuple[Tensor, int | None]:
        return _Root.apply(x), in_dims[0]


def _slope(x: Tensor) -> Tensor:
    return (0.25 / x.clamp(min=0.25 / _MAX_SLOPE**2)).sqrt()
