"""mLSTM: a matrix memory with exponential input gates, the mixer of xLSTM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqlib.errors import ConfigError
from seqlib.layers.init import fill_, linear_
from seqlib.layers.linear import Linear
from seqlib.layers.steps import project
from seqlib.mixers.base import Mixer, MixerConfig, positive, wide, wide_dtype, within
from seqlib.mixers.matrix import divide
from seqlib.ops import linear_attention
from seqlib.ops.documents import by_document, zero_padding
from seqlib.ops.linear_attention import step as attention_step
from seqlib.sequence import SequenceInfo, State

__all__ = ["MLSTM", "MLSTMConfig", "MLSTMState"]


@dataclass(frozen=True, kw_only=True)
class MLSTMConfig(MixerConfig):
    """Hyperparameters of `MLSTM`; the defaults are those of xLSTM-7B."""

    kind: str = "mlstm"
    nheads: int = 8
    expand_k: float = 0.5
    """Width of all queries = expand_k * d_model."""
    expand_v: float = 1.0
    """Width of all values = expand_v * d_model."""
    gate_cap: float = 15.0
    """Pre-activations of the gates are capped softly: cap * tanh(. / cap)."""
    eps: float = 1e-6
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        positive(self, "nheads")
        within(self, 0, 1000, "expand_k", "expand_v")
        if not 0 < self.gate_cap <= 40:  # exp of more, summed up, leaves float32
            raise ConfigError(f"mlstm: gate_cap must be in (0, 40], got {self.gate_cap}")


@dataclass
class MLSTMState(State):
    """state: (batch, nheads, d_state, headdim + 1), keys summed up in its last column; m: (batch, nheads); float32."""

    state: Tensor
    m: Tensor


class MLSTM(Mixer[MLSTMConfig]):
    """Matrix LSTM.

        q, k, v, o = qkvo_proj(x);  i, f = cap(if_proj(x));  q = d_state^(-1/2) q
        C_t = sigmoid(f_t) C_{t-1} + exp(i_t) k_t^T v_t;   n_t = sigmoid(f_t) n_{t-1} + exp(i_t) k_t
        m_t = max(logsigmoid(f_t) + m_{t-1}, i_t);   h_t = q_t C_t / (max(|q_t . n_t|, 1) + eps exp(m_t))
        y = out_proj(layer_norm(h) * sigmoid(o))                                                       norm per head

    That is the published form with C and n not divided by exp(m): capped gates stay within float32 as they are, and m
    is left in the eps only.

    Source: Beck et al. 2024 (xLSTM, arXiv 2405.04517), eq. 19-27; Beck et al. 2025 (xLSTM-7B, arXiv 2503.13427);
    NX-AI/xlstm.
    """

    Config: ClassVar[type[MixerConfig]] = MLSTMConfig

    def __init__(self, config: MLSTMConfig, d_model: int, **place: Any) -> None:
        super().__init__(config, d_model, **place)
        c = config
        d_key, d_value = int(c.expand_k * d_model), int(c.expand_v * d_model)
        d_state = divide(c.kind, "expand_k * d_model", d_key, "nheads", c.nheads)
        headdim = divide(c.kind, "expand_v * d_model", d_value, "nheads", c.nheads)
        self.matrix_shape = (c.nheads, d_state, headdim + 1)
        self.widths = [d_key, d_key, d_value, d_value]
        self.qkvo_proj = Linear(d_model, sum(self.widths), bias=False)
        self.if_proj = Linear(d_model, 2 * c.nheads)
        self.norm_weight = nn.Parameter(torch.empty(d_value))
        self.out_proj = Linear(d_value, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        linear_(self.qkvo_proj)
        fill_(self.if_proj.weight, 0.0)
        nheads = self.config.nheads
        forget = torch.linspace(3.0, 6.0, nheads, device=self.norm_weight.device)
        fill_(self.if_proj.bias, torch.cat([torch.full_like(forget, -10.0), forget]))
        fill_(self.norm_weight, 1.0)
        linear_(self.out_proj, self.residual_scale)

    def forward(
        self, x: Tensor, state: MLSTMState | None = None, seq: SequenceInfo | None = None
    ) -> tuple[Tensor, MLSTMState]:
        self.check(x, seq)
        q, k, v, o, log_i, log_f = self._heads(x)
        m, last = _running_max(log_i, log_f, None if state is None else state.m, seq)
        y, matrix = linear_attention(
            q, k, v, log_f, scale=q.shape[-1] ** -0.5, initial_state=None if state is None else state.state, seq=seq,
            backend=self.backend("linear_attention"),
        )  # fmt: skip
        return self._out(y, o, m), MLSTMState(matrix, last)

    def step(self, x: Tensor, state: MLSTMState) -> tuple[Tensor, MLSTMState]:
        q, k, v, o, log_i, log_f = self._heads(x)
        state.m.copy_(torch.maximum(log_f + state.m, log_i))
        y = attention_step(q, k, v, log_f, state.state, scale=q.shape[-1] ** -0.5)
        return self._out(y, o, state.m), state

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """q, exp(i) k and (v, 1) by heads, o, and the logarithms of both gates."""
        c = self.config
        cap = c.gate_cap
        qkvo, gates = project(x, self.qkvo_proj, self.if_proj)
        log_i, f = (cap * torch.tanh(wide(gates) / cap)).chunk(2, -1)
        q, k, v, o = qkvo.split(self.widths, -1)
        q, k, v = (t.unflatten(-1, (c.nheads, -1)) for t in (q, k, v))
        if x.dtype == torch.float16:  # whose range ends before that of the gate
            q, k, v = q.float(), k.float(), v.float()
        k = (k * log_i.exp().unsqueeze(-1)).to(q.dtype)
        return q, k, F.pad(v, (0, 1), value=1.0), o, log_i, F.logsigmoid(f)

    def _out(self, y: Tensor, o: Tensor, m: Tensor) -> Tensor:
        y = wide(y)
        h = y[..., :-1] / (y[..., -1:].abs().clamp(min=1.0) + self.config.eps * m.exp().unsqueeze(-1))
        h = F.layer_norm(h, h.shape[-1:], eps=self.config.norm_eps).flatten(-2) * self.norm_weight
        return self.out_proj(h.to(o.dtype) * torch.sigmoid(o))

    def initial_state(
        self,
        batch: int,
        max_seqlen: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> MLSTMState:
        weight = self.norm_weight
        options: dict[str, Any] = {"dtype": wide_dtype(weight), "device": device or weight.device}
        return MLSTMState(
            torch.zeros(batch, *self.matrix_shape, **options), torch.zeros(batch, self.config.nheads, **options)
        )

    def state_bytes(self, batch: int, seqlen: int) -> int:
        nheads, d_state, columns = self.matrix_shape
        return batch * nheads * (d_state * columns + 1) * wide_dtype(self.norm_weight).itemsize


def _running_max(
    log_i: Tensor, log_f: Tensor, before: Tensor | None, seq: SequenceInfo | None
) -> tuple[Tensor, Tensor]:
    """m_t = max(log_f_t + m_{t-1}, log_i_t) along (batch, seqlen, nheads), 0 where a document begins, and the last m.

    With F the running sum of log_f it is F_t + max over s <= t of log_i_s - F_s, in float64 because F grows.
    """
    first = torch.zeros_like(log_i[:, 0]) if before is None else before
    if seq is not None and seq.starts is not None:
        return by_document(_running_max, (log_i, log_f), log_i, before, first, seq)
    i, f = log_i.double(), zero_padding(log_f.double(), seq)
    if seq is not None and seq.padding_mask is not None:
        i = i.masked_fill(~seq.padding_mask.unsqueeze(-1), -torch.inf)
    total = f.cumsum(1)
    candidates = torch.cat([first.double()[:, None], i - total], 1)
    m = (candidates.cummax(1).values[:, 1:] + total).to(log_i.dtype)
    return m, m[:, -1]
