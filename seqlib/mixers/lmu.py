"""LMU: a frozen memory of the recent past, read together with the input."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlib.errors import ConfigError
from seqlib.layers.init import linear_
from seqlib.layers.linear import Linear, stored
from seqlib.layers.lti import add_carried
from seqlib.mixers.base import Mixer, MixerConfig, positive, wide, wide_dtype
from seqlib.ops import long_conv
from seqlib.sequence import SequenceInfo, State

__all__ = ["LMU", "LMUConfig", "LMUState"]


@dataclass(frozen=True, kw_only=True)
class LMUConfig(MixerConfig):
    """Hyperparameters of `LMU`."""

    kind: str = "lmu"
    d_state: int = 64
    """Legendre coefficients per memory."""
    theta: float = 128.0
    """Length of the window that a memory holds, in positions."""
    n_memory: int = 1
    """Signals that are remembered, each a projection of the input; published models have one."""
    d_hidden: int | None = None
    """Width of what is read from memory and input; None is d_model."""

    def __post_init__(self) -> None:
        positive(self, "d_state", "n_memory", "d_hidden")
        if not self.theta > 0:
            raise ConfigError(f"lmu: theta must be positive, got {self.theta}")


@dataclass
class LMUState(State):
    """memory: (batch, n_memory, d_state), float32."""

    memory: Tensor


class LMU(Mixer[LMUConfig]):
    """Legendre memory units in their parallel form.

        u = relu(W_u x + b_u);  m_t = A_bar m_{t-1} + B_bar u_t;  h = relu(W_h [m; x] + b_h);  y = W_o h + b_o
        A_ij = (2i+1)/theta (-1 if i < j else (-1)^(i-j+1)),  B_i = (2i+1)/theta (-1)^i,  zero-order hold of one step

    A and B are not learned: m holds the coefficients of the last theta values of u on Legendre polynomials.

    Source: Voelker et al. 2019, equations 1 and 2; Chilkuri and Eliasmith 2021 (arXiv 2102.11417), section 3;
    zeyuliu1037/LMUFormer.
    """

    Config: ClassVar[type[MixerConfig]] = LMUConfig

    def __init__(self, config: LMUConfig, d_model: int, **place: Any) -> None:
        super().__init__(config, d_model, **place)
        hidden = config.d_hidden or d_model
        self.u_proj = Linear(d_model, config.n_memory)
        self.h_proj = Linear(config.n_memory * config.d_state + d_model, hidden)
        self.out_proj = Linear(hidden, d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        linear_(self.u_proj)
        linear_(self.h_proj)
        linear_(self.out_proj, self.residual_scale)

    def forward(
        self, x: Tensor, state: LMUState | None = None, seq: SequenceInfo | None = None
    ) -> tuple[Tensor, LMUState]:
        self.check(x, seq)
        c = self.config
        u = wide(F.relu(self.u_proj(x)))
        kernel = _responses(c.d_state, c.theta, x.shape[1], u.dtype, u.device).repeat(c.n_memory, 1)
        m, _ = long_conv(u.repeat_interleave(c.d_state, -1), kernel, seq=seq, backend=self.backend("long_conv"))
        if state is not None:
            m = add_carried(m, self._carried(state.memory, x.shape[1]).flatten(2), seq)
        last = self._last(m.unflatten(2, (c.n_memory, -1)), state, seq)
        return self._read(m, x), LMUState(last)

    def step(self, x: Tensor, state: LMUState) -> tuple[Tensor, LMUState]:
        memory = state.memory
        A_bar, B_bar = _system(self.config.d_state, self.config.theta, memory)
        u = F.relu(self.u_proj(x)).to(memory.dtype)
        with torch.autocast(x.device.type, enabled=False):
            memory.copy_(memory @ A_bar.T + u[..., None] * B_bar)
        return self._read(memory.flatten(1), x), state

    def _read(self, m: Tensor, x: Tensor) -> Tensor:
        return self.out_proj(F.relu(self.h_proj(torch.cat([m.to(x.dtype), x], -1))))

    def _carried(self, memory: Tensor, length: int) -> Tensor:
        """A_bar^(l+1) memory for l < length: (batch, length, n_memory, d_state), a table of powers at a time."""
        powers = _powers(self.config.d_state, self.config.theta, memory.dtype, memory.device)
        parts = []
        with torch.autocast(memory.device.type, enabled=False):
            for _ in range(-(-length // len(powers))):
                parts.append(torch.einsum("lnm,bcm->blcn", powers, memory))
                memory = parts[-1][:, -1]
        return torch.cat(parts, 1)[:, :length]

    def _last(self, m: Tensor, state: LMUState | None, seq: SequenceInfo | None) -> Tensor:
        """The memory after the last real token of every row."""
        if seq is None or seq.padding_mask is None:
            return m[:, -1].clone()  # `step` writes into it
        real = seq.padding_mask
        at = real.shape[1] - 1 - real.long().flip(1).argmax(1)
        before = torch.zeros_like(m[:, 0]) if state is None else state.memory
        return torch.where(real.any(1)[:, None, None], m[torch.arange(len(m), device=m.device), at], before)

    def initial_state(
        self,
        batch: int,
        max_seqlen: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> LMUState:
        weight = stored(self.out_proj, self)
        shape = (batch, self.config.n_memory, self.config.d_state)
        return LMUState(torch.zeros(shape, dtype=wide_dtype(weight), device=device or weight.device))

    def state_bytes(self, batch: int, seqlen: int) -> int:
        return batch * self.config.n_memory * self.config.d_state * wide_dtype(stored(self.out_proj, self)).itemsize


# Tensors made in inference mode could not serve a backward pass later.


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)
def _discrete(n: int, theta: float) -> tuple[Tensor, Tensor]:
    """A_bar (n, n) and B_bar (n,), float64 on the CPU."""
    i = torch.arange(n, dtype=torch.float64)
    sign = torch.where(i[:, None] < i, -1.0, (-1.0) ** (i[:, None] - i + 1))
    whole = torch.zeros(n + 1, n + 1, dtype=torch.float64)
    whole[:n, :n] = (2 * i[:, None] + 1) / theta * sign
    whole[:n, n] = (2 * i + 1) / theta * (-1.0) ** i
    # exp of [[A, B], [0, 0]] is [[A_bar, B_bar], [0, 1]].
    held = torch.linalg.matrix_exp(whole)
    return held[:n, :n].contiguous(), held[:n, n].contiguous()


def _system(n: int, theta: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """A_bar and B_bar beside `like`."""
    if torch.compiler.is_compiling():  # a traced tensor must not stay behind
        A_bar, B_bar = (torch.tensor(numbers, dtype=like.dtype, device=like.device) for numbers in _numbers(n, theta))
        return A_bar, B_bar
    return _system_on(n, theta, like.dtype, like.device)


@torch.compiler.assume_constant_result
def _numbers(n: int, theta: float) -> tuple[list[list[float]], list[float]]:
    A_bar, B_bar = _discrete(n, theta)
    return A_bar.tolist(), B_bar.tolist()


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)
def _system_on(n: int, theta: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    A_bar, B_bar = _discrete(n, theta)
    return A_bar.to(device, dtype), B_bar.to(device, dtype)


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)
def _responses(n: int, theta: float, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A_bar^l B_bar for l < length, (n, length), by doubling."""
    power, B_bar = _discrete(n, theta)
    columns = B_bar[:, None]
    while columns.shape[1] < length:
        columns = torch.cat([columns, power @ columns], 1)
        power = power @ power
    return columns[:, :length].to(device, dtype).contiguous()


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)
def _powers(n: int, theta: float, dtype: torch.dtype, device: torch.device, count: int = 32) -> Tensor:
    """A_bar^(l+1) for l < count, (count, n, n)."""
    A_bar, _ = _discrete(n, theta)
    found = [A_bar]
    for _ in range(count - 1):
        found.append(A_bar @ found[-1])
    return torch.stack(found).to(device, dtype)
