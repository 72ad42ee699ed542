"""Mega: a damped moving average of every channel under gated attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqlib.errors import ConfigError, UnsupportedInput
from seqlib.layers.init import fill_, normal_
from seqlib.layers.kept import Kept
from seqlib.layers.linear import Linear
from seqlib.layers.lti import Diagonal, continue_span
from seqlib.layers.rotary import Rotary
from seqlib.mixers.base import Mixer, MixerConfig, positive, wide, wide_dtype
from seqlib.mixers.lti import NoState, refuse_state
from seqlib.ops import attention, long_conv, ssm_kernel_diag
from seqlib.ops.attention import KVState
from seqlib.ops.attention import step as attention_step
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
    """Width of queries and keys. Even."""
    chunk_size: int | None = 2048
    """Attention stays inside chunks of this many positions of a document; None for the whole document."""
    bidirectional: bool = False
    """Averages run both ways and attention sees the whole chunk; such a layer has no state to go on from."""

    def __post_init__(self) -> None:
        positive(self, "d_state", "d_hidden", "d_qk", "chunk_size")
        if self.d_qk % 2:
            raise ConfigError(f"mega: d_qk must be even (rotary bias), got {self.d_qk}")


@dataclass
class MegaState(State):
    """ema: (batch, d_model, d_state), float32; kv: keys and values of the present chunk (or document)."""

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
        y, state = continue_span(self._keep("system", None, self._system), x, y, state, seq)
        return F.silu(y), state

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
        q, k = z * w + b, one pair (w, b) for each;  o = softmax(q k^T / sqrt(d_qk) + bias) v, inside chunks
        y = u * (silu(s + W_h (o * r)) - x),  bias_ij = (R_i a) . (R_j b), R_i the rotation by position i

    The highway gate mixes with the input of the mixer, which in a pre-norm block is the normalised one; the source
    takes the one before the norm. Scores are normalised by softmax; the laplace and squared-relu scores of its image
    models are not offered.

    Source: Ma et al. 2022 (arXiv 2209.10655), section 3; facebookresearch/mega, moving_average_gated_attention.py.
    """

    Config: ClassVar[type[MixerConfig]] = MegaConfig
    supports: ClassVar[frozenset[str]] = frozenset({"packed", "padded", "initial_state", "bidirectional"})

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
        self.bias_a = nn.Parameter(torch.empty(config.d_qk))
        self.bias_b = nn.Parameter(torch.empty(config.d_qk))
        self.rotary = Rotary(config.d_qk)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.ema.reset_parameters()
        for projection in (self.v_proj, self.m_proj, self.h_proj):
            normal_(projection.weight, 0.02)
            fill_(projection.bias, 0.0)
        normal_(self.qk_weight, 0.02)
        fill_(self.qk_bias, 0.0)
        normal_(self.bias_a, 0.02)
        normal_(self.bias_b, 0.02)

    def param_groups(self) -> list[tuple[list[str], dict[str, Any]]]:
        return [([f"ema.{name}" for name, _ in self.ema.named_parameters()], {"weight_decay": 0.0})]

    def forward(
        self, x: Tensor, state: MegaState | None = None, seq: SequenceInfo | None = None
    ) -> tuple[Tensor, MegaState | NoState]:
        self.check(x, seq)
        c = self.config
        if c.bidirectional:
            refuse_state(c, state)
            state = None
        m, ema = self.ema(x, None if state is None else state.ema, seq, self.backend("long_conv"))
        u, z, r, s = self._split(m)
        kv = None if state is None else state.kv
        position = self._positions(x, kv, seq)
        if c.chunk_size is not None:  # every chunk is a document of its own
            starts = position % c.chunk_size == 0
            seq = SequenceInfo(starts, None if seq is None else seq.padding_mask)
            position = position % c.chunk_size
        q, k = self._q_k(z, position)
        v = F.silu(self.v_proj(x))
        o, kv = attention(
            q[:, :, None], k[:, :, None], v[:, :, None], window=None if c.bidirectional else c.chunk_size,
            causal=not c.bidirectional, scale=c.d_qk**-0.5, state=kv, seq=seq, backend=self.backend("attention"),
        )  # fmt: skip
        y = self._gate(x, u, s, r, o.squeeze(2))
        return y, NoState() if c.bidirectional or ema is None else MegaState(ema, kv)

    def step(self, x: Tensor, state: MegaState) -> tuple[Tensor, MegaState]:
        c, kv = self.config, state.kv
        m = self.ema.step(x, state.ema)
        u, z, r, s = self._split(m)
        if c.chunk_size is not None:
            over = kv.length >= c.chunk_size
            kv.length.masked_fill_(over, 0)
            for held in (kv.k, kv.v):
                held.masked_fill_(over[:, None, None, None], 0)
        elif x.device.type == "cpu" and int(kv.length.max()) >= kv.capacity:
            kv = state.kv = kv.reserve(max(16, 2 * kv.capacity))
        q, k = (t.squeeze(1) for t in self._q_k(z[:, None], kv.length[:, None]))
        v = F.silu(self.v_proj(x))
        o = attention_step(q[:, None], k[:, None], v[:, None], kv, window=c.chunk_size, scale=c.d_qk**-0.5)  # one head
        return self._gate(x, u, s, r, o.squeeze(1)), state

    def _split(self, m: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        u, z, r, s = self.m_proj(m).split(self.sizes, -1)
        return torch.sigmoid(u), F.silu(z), F.silu(r), s

    def _q_k(self, z: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys (batch, seqlen, 2 d_qk): the second halves multiply to the bias of their two positions."""
        q, k = (z[..., None, :] * self.qk_weight + self.qk_bias).unbind(-2)
        a, b = (t.expand(*position.shape, 1, -1) for t in (self.bias_a * self.config.d_qk**0.5, self.bias_b))
        a, b = (t.squeeze(2).expand_as(q) for t in self.rotary(position, a, b))
        return torch.cat([q, a.to(q.dtype)], -1), torch.cat([k, b.to(k.dtype)], -1)

    def _gate(self, x: Tensor, u: Tensor, s: Tensor, r: Tensor, o: Tensor) -> Tensor:
        return self.residual_scale * u * (F.silu(s + self.h_proj(o.to(x.dtype) * r)) - x)

    def _positions(self, x: Tensor, kv: KVState | None, seq: SequenceInfo | None) -> Tensor:
        """(batch, seqlen): tokens of the document before each one, counted from the start of the chunk of the state."""
        batch, seqlen = x.shape[:2]
        here = (seq or SequenceInfo()).positions(batch, seqlen, x.device)
        if kv is None:
            return here
        before = kv.length[:, None]
        return here + (before if seq is None or seq.document_ids is None else before * (seq.document_ids == 0))

    def initial_state(
        self,
        batch: int,
        max_seqlen: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> MegaState:
        c, weight = self.config, self.v_proj.weight
        if c.bidirectional:
            raise UnsupportedInput("mega with bidirectional=True has no state and cannot decode")
        device = device or weight.device
        ema = torch.zeros(batch, self.d_model, c.d_state, dtype=wide_dtype(weight), device=device)
        capacity = c.chunk_size or max_seqlen or 0
        sizes = (batch, capacity, 1, 2 * c.d_qk, self.hidden)
        return MegaState(ema, KVState.empty(*sizes, dtype=dtype or weight.dtype, device=device))

    def state_bytes(self, batch: int, seqlen: int) -> int:
        c, weight = self.config, self.v_proj.weight
        if c.bidirectional:
            return 0
        token = (2 * c.d_qk + self.hidden) * weight.element_size()
        ema = self.d_model * c.d_state * wide_dtype(weight).itemsize
        return batch * (ema + (c.chunk_size or seqlen) * token + torch.long.itemsize)
