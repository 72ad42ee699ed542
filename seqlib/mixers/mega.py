"""Mega: a damped moving average of every channel under gated attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqlib.errors import ConfigError, UnsupportedInput
from seqlib.layers.chunk_attention import SCORES, chunk_attention, chunk_attention_step
from seqlib.layers.init import fill_, normal_
from seqlib.layers.kept import Kept
from seqlib.layers.linear import Linear, stored
from seqlib.layers.lti import Diagonal, add_carried, final_state
from seqlib.mixers.base import Mixer, MixerConfig, positive, wide, wide_dtype
from seqlib.mixers.lti import NoState, refuse_state
from seqlib.ops import long_conv, ssm_kernel_diag
from seqlib.ops.attention import KVState
from seqlib.sequence import SequenceInfo, State

__all__ = ["EMA", "Mega", "MegaConfig", "MegaState"]


@dataclass(frozen=True, kw_only=True)
class MegaConfig(MixerConfig):
    """Hyperparameters of `Mega`; the defaults are those of its language models."""

    kind: str = "mega"
    d_state: int = 16
    """Averages per channel."""
    d_hidden: int | None = None
    """Width of the values; None is 2 d_model."""
    d_qk: int = 64
    """Width of queries and keys; even with the rotary bias."""
    chunk_size: int | None = 2048
    """Attention stays inside chunks of this many positions of a document; None for the whole document."""
    scores: str = "softmax"
    """"softmax", or "laplace" or "relu2" (squared relu) of each score by itself."""
    bias: str = "rotary"
    """What distance adds to a score: "rotary", (R_i a) . (R_j b), or "simple", a table of `max_positions` distances."""
    max_positions: int | None = None
    """Positions that the table reaches; None is chunk_size."""
    bidirectional: bool = False
    """Averages run both ways and attention sees the whole chunk; such a layer has no state to go on from."""

    def __post_init__(self) -> None:
        positive(self, "d_state", "d_hidden", "d_qk", "chunk_size", "max_positions")
        for name, values in (("scores", SCORES), ("bias", ("rotary", "simple"))):
            if getattr(self, name) not in values:
                raise ConfigError(f"mega: {name} must be one of {', '.join(values)}, got {getattr(self, name)!r}")
        if self.bias == "rotary" and self.d_qk % 2:
            raise ConfigError(f"mega: the rotary bias needs an even d_qk, got {self.d_qk}")
        if self.bias == "simple" and not (self.max_positions or self.chunk_size):
            raise ConfigError("mega: bias='simple' without chunks needs max_positions")


@dataclass
class MegaState(State):
    """ema: (batch, d_model, d_state), float32; kv: keys and values of the present chunk (or document), one head."""

    ema: Tensor
    kv: KVState


class EMA(nn.Module):
    """Damped exponential moving averages, d_state per channel.

        h_t = (1 - p a) h_{t-1} + p beta x_t,  y = silu(sum_n gamma_n h_n / sqrt(d_state) + omega x)
        p = sigmoid(delta), a = sigmoid(alpha)

    Two directions have two sets of parameters; both count the current input.

    Source: Ma et al. 2022 (Mega, arXiv 2209.10655), equations 3 and 4; facebookresearch/mega,
    exponential_moving_average.py.
    """

    def __init__(self, d_model: int, d_state: int, directions: int) -> None:
        super().__init__()
        shape = (directions, d_model, d_state)
        self.delta, self.alpha, self.beta, self.gamma = (nn.Parameter(torch.empty(shape)) for _ in range(4))
        self.omega = nn.Parameter(torch.empty(d_model))
        self._kept = Kept()

    def reset_parameters(self) -> None:
        normal_(self.delta, 0.2)
        normal_(self.alpha, 0.2)
        signs = 1.0 - 2.0 * (torch.arange(self.beta.shape[-1], device=self.beta.device) % 2)
        fill_(self.beta, signs + 0.02 * torch.randn(self.beta.shape, device=self.beta.device))
        normal_(self.gamma, 1.0)
        normal_(self.omega, 1.0)

    def forward(
        self, x: Tensor, state: Tensor | None, seq: SequenceInfo | None, backend: str
    ) -> tuple[Tensor, Tensor | None]:
        kernel = self.kernel(x.shape[1] + len(self.delta) - 1)
        if len(kernel) == 2:
            # Both kernels count lag 0; the convolution takes the second from lag -1.
            D = wide(self.omega) + kernel[1, :, 0]
            y, _ = long_conv(x, kernel[0], D=D, reverse_kernel=kernel[1, :, 1:], seq=seq, backend=backend)
            return F.silu(y), None
        y, _ = long_conv(x, kernel[0], D=self.omega, seq=seq, backend=backend)
        system = self._keep("system", None, self._system)
        if state is not None:
            y = add_carried(y, system.outputs(state, x.shape[1]), seq)
        return F.silu(y), final_state(system, x, state, seq)

    def step(self, x: Tensor, state: Tensor) -> Tensor:
        """One position (batch, d_model); `state` is updated in place."""
        decay, into, out = self._keep("step", None, self._step_tensors)
        u = x.to(state.dtype)
        h = state.mul_(decay).addcmul_(into, u[..., None])
        return F.silu((h * out).sum(-1) + self.omega * u).to(x.dtype)

    def kernel(self, length: int) -> Tensor:
        """(directions, d_model, length)."""
        return self._keep("kernel", length, lambda: self._make_kernel(length))

    def _keep(self, name: str, key: int | None, make: Any) -> Any:
        return self._kept(name, key, [self.delta, self.alpha, self.beta, self.gamma], make)

    def _make_kernel(self, length: int) -> Tensor:
        log_decay, into, out = (t.flatten(0, 1) for t in self._coefficients())
        one = torch.ones(len(out), dtype=out.dtype, device=out.device)
        kernel = ssm_kernel_diag(log_decay, into, out, one, length, discretization="dirac")
        return kernel.unflatten(0, (len(self.delta), -1))

    def _system(self) -> Diagonal:
        log_decay, into, out = (t[0] for t in self._coefficients())
        return Diagonal(log_decay, into, out, pairs=False)

    def _step_tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        log_decay, into, out = (t[0] for t in self._coefficients())
        return torch.exp(log_decay).to(out.dtype), into.to(out.dtype), out

    def _coefficients(self) -> tuple[Tensor, Tensor, Tensor]:
        """log(1 - p a) and p beta in float64, gamma / sqrt(d_state); (directions, d_model, d_state)."""
        p = torch.sigmoid(self.delta.double())
        log_decay = torch.log1p(-p * torch.sigmoid(self.alpha.double()))
        return log_decay, p * self.beta.double(), wide(self.gamma) * self.gamma.shape[-1] ** -0.5


class Mega(Mixer[MegaConfig]):
    """Gated attention over moving averages.

        v = silu(W_v x);  m = ema(x);  u, z, r, s = split(W_m m);  u = sigmoid(u);  z, r = silu(z), silu(r)
        q, k = z * w + b, one pair (w, b) for each;  o = scores(q, k) v inside chunks (`layers.chunk_attention`)
        y = u * (silu(s + W_h (o * r)) - residual)

    The block adds y to `residual`, the stream before its norm, so that u is a highway gate.

    Source: Ma et al. 2022 (arXiv 2209.10655), section 3; facebookresearch/mega, moving_average_gated_attention.py.
    """

    Config: ClassVar[type[MixerConfig]] = MegaConfig
    supports: ClassVar[frozenset[str]] = frozenset({"packed", "padded", "initial_state", "bidirectional"})
    takes_residual: ClassVar[bool] = True

    def __init__(self, config: MegaConfig, d_model: int, **place: Any) -> None:
        super().__init__(config, d_model, **place)
        self.hidden = config.d_hidden or 2 * d_model
        self.sizes = [d_model, config.d_qk, self.hidden, d_model]
        self.ema = EMA(d_model, config.d_state, 2 if config.bidirectional else 1)
        self.v_proj = Linear(d_model, self.hidden)
        self.m_proj = Linear(d_model, sum(self.sizes))
        self.h_proj = Linear(self.hidden, d_model)
        self.qk_weight = nn.Parameter(torch.empty(2, config.d_qk))
        self.qk_bias = nn.Parameter(torch.empty(2, config.d_qk))
        rotary = config.bias == "rotary"
        reach = config.max_positions or config.chunk_size or 0
        self.position_bias = nn.Parameter(torch.empty(2, config.d_qk) if rotary else torch.empty(2 * reach - 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.ema.reset_parameters()
        for projection in (self.v_proj, self.m_proj, self.h_proj):
            normal_(projection.weight, 0.02)
            fill_(projection.bias, 0.0)
        normal_(self.qk_weight, 0.02)
        fill_(self.qk_bias, 0.0)
        normal_(self.position_bias, 0.02)

    def param_groups(self) -> list[tuple[list[str], dict[str, Any]]]:
        return [([f"ema.{name}" for name, _ in self.ema.named_parameters()], {"weight_decay": 0.0})]

    def forward(
        self,
        x: Tensor,
        state: MegaState | None = None,
        seq: SequenceInfo | None = None,
        residual: Tensor | None = None,
    ) -> tuple[Tensor, MegaState | NoState]:
        self.check(x, seq)
        c = self.config
        if c.bidirectional:
            refuse_state(c, state)
            state = None
        m, ema = self.ema(x, None if state is None else state.ema, seq, self.backend("long_conv"))
        u, q, k, r, s = self._split(m)
        o, kv = chunk_attention(
            q, k, F.silu(self.v_proj(x)), self.relative, scores=c.scores, chunk_size=c.chunk_size,
            causal=not c.bidirectional, state=None if state is None else state.kv, seq=seq,
        )  # fmt: skip
        y = self._gate(x if residual is None else residual, u, s, r, o)
        return y, NoState() if ema is None or kv is None else MegaState(ema, kv)

    def step(self, x: Tensor, state: MegaState, residual: Tensor | None = None) -> tuple[Tensor, MegaState]:
        c, kv = self.config, state.kv
        u, q, k, r, s = self._split(self.ema.step(x, state.ema))
        looks = x.device.type == "cpu" and not torch.compiler.is_compiling()
        if c.chunk_size is None and looks and int(kv.length.max()) >= kv.capacity:
            kv = state.kv = kv.reserve(max(16, 2 * kv.capacity))
        v = F.silu(self.v_proj(x))
        o = chunk_attention_step(q, k, v, self.relative, kv, scores=c.scores, chunk_size=c.chunk_size)
        return self._gate(x if residual is None else residual, u, s, r, o), state

    def relative(self, count: int) -> Tensor:
        """(2 count - 1,) what is added to scores by the distance from query to key, 1 - count .. count - 1."""
        table = wide(self.position_bias)
        if self.config.bias == "simple":
            reach = (len(table) + 1) // 2
            if count > reach:
                raise UnsupportedInput(
                    f"mega: the bias reaches {reach} positions, got {count}; set max_positions or chunk_size"
                )
            return table[reach - count : reach + count - 1]
        a, b = (t.chunk(2) for t in table)
        half = len(a[0])
        frequency = 10000.0 ** -(torch.arange(half, dtype=torch.float64, device=table.device) / half)
        angle = torch.arange(1 - count, count, device=table.device)[:, None] * frequency
        # a . R b by the angle between the two positions.
        even, odd = a[0] * b[0] + a[1] * b[1], a[1] * b[0] - a[0] * b[1]
        return angle.cos().to(table.dtype) @ even + angle.sin().to(table.dtype) @ odd

    def _split(self, m: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        u, z, r, s = self.m_proj(m).split(self.sizes, -1)
        q, k = (F.silu(z)[..., None, :] * self.qk_weight + self.qk_bias).unbind(-2)
        return torch.sigmoid(u), q, k, F.silu(r), s

    def _gate(self, residual: Tensor, u: Tensor, s: Tensor, r: Tensor, o: Tensor) -> Tensor:
        return u * (F.silu(s + self.h_proj(o * r)) - residual.to(u.dtype))

    def initial_state(
        self,
        batch: int,
        max_seqlen: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> MegaState:
        c, weight = self.config, stored(self.v_proj, self)
        if c.bidirectional:
            raise UnsupportedInput("mega with bidirectional=True has no state and cannot decode")
        device = device or weight.device
        ema = torch.zeros(batch, self.d_model, c.d_state, dtype=wide_dtype(weight), device=device)
        sizes = (batch, c.chunk_size or max_seqlen or 0, 1, c.d_qk, self.hidden)
        return MegaState(ema, KVState.empty(*sizes, dtype=dtype or weight.dtype, device=device))

    def state_bytes(self, batch: int, seqlen: int) -> int:
        c, weight = self.config, stored(self.v_proj, self)
        if c.bidirectional:
            return 0
        token = (c.d_qk + self.hidden) * weight.element_size()
        ema = self.d_model * c.d_state * wide_dtype(weight).itemsize
        return batch * (ema + (c.chunk_size or seqlen) * token + torch.long.itemsize)
