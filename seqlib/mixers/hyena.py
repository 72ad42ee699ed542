"""Hyena: a gated long convolution whose kernel a small network makes from positions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqlib.errors import ConfigError
from seqlib.layers.init import fill_, linear_, normal_
from seqlib.layers.kept import Kept
from seqlib.layers.linear import Affine, Linear
from seqlib.layers.short_conv import ShortConv
from seqlib.layers.stream import InputsState
from seqlib.mixers.base import Mixer, MixerConfig, positive, wide, within
from seqlib.ops import long_conv
from seqlib.ops.derivatives import recomputed
from seqlib.ops.long_conv import OnlineConv
from seqlib.sequence import SequenceInfo, State

__all__ = ["Hyena", "HyenaConfig", "HyenaState"]


@dataclass(frozen=True, kw_only=True)
class HyenaConfig(MixerConfig):
    """Hyperparameters of `Hyena`; the defaults are those of HazyResearch/safari."""

    kind: str = "hyena"
    l_max: int = 1024
    """Lags of the kernel: the length of the sequences to train on. Positions further back are not seen."""
    d_conv: int = 3
    d_filter: int = 64
    """Width of the network that makes the kernel."""
    d_position: int = 3
    """Features of a position: itself and (d_position - 1) / 2 cosines and sines. Odd."""
    n_inner: int = 2
    """Inner layers of the network."""
    frequency: float = 1.0
    """Start of the learned frequencies of its sines."""
    fast_decay: float = 0.3
    slow_decay: float = 1.5
    """Parts of l_max after which the window of the fastest and of the slowest channel has fallen to 1/100."""
    shift: float = 0.0
    """Added to the window."""
    lr: float | None = 1e-3
    """Learning rate of the network; None is that of the model."""
    lr_position: float = 1e-5
    """Learning rate of the features of positions."""

    def __post_init__(self) -> None:
        positive(self, "l_max", "d_conv", "d_filter", "d_position", "n_inner")
        within(self, 1, 1000, "n_inner")
        if self.d_position % 2 == 0 or self.d_position < 3:
            raise ConfigError(f"hyena: d_position must be odd and at least 3, got {self.d_position}")
        if not 0 < self.fast_decay <= self.slow_decay:
            raise ConfigError(f"hyena: need 0 < fast_decay <= slow_decay, got {self.fast_decay} and {self.slow_decay}")


@dataclass
class HyenaState(State):
    """conv: (batch, d_conv - 1, 3 d_model), the last projections; stream: the last inputs of the long convolution."""

    conv: Tensor
    stream: InputsState

    def tensors(self) -> Iterator[Tensor]:
        return iter([self.conv, *self.stream.tensors()])

    @property
    def nbytes(self) -> int:
        return self.conv.numel() * self.conv.element_size() + self.stream.nbytes


class Hyena(Mixer[HyenaConfig]):
    """The Hyena operator of order 2.

        g, k, v = causal_conv1d(in_proj(u));  y = out_proj(g * (conv(k * v, kernel) + D k v))
        kernel[l] = network(position features of l) * (exp(-|decay| l / (l_max - 1)) + shift)

    The network is sin(f W h + ..) after every layer but the last, with learned f; its parameters have no weight decay.

    Source: Poli et al. 2023 (arXiv 2302.10866), section 3; HazyResearch/safari, src/models/sequence/hyena.py.
    """

    Config: ClassVar[type[MixerConfig]] = HyenaConfig

    def __init__(self, config: HyenaConfig, d_model: int, **place: Any) -> None:
        super().__init__(config, d_model, **place)
        c, width = config, config.d_filter
        self.in_proj = Linear(d_model, 3 * d_model)
        self.conv1d = ShortConv(3 * d_model, c.d_conv, activation=None)
        self.positions = nn.Parameter(torch.empty(c.l_max, c.d_position))
        self.frequency = nn.Parameter(torch.empty(width))
        layers = [Affine(c.d_position, width), *(Affine(width, width) for _ in range(c.n_inner))]
        self.filter = nn.ModuleList([*layers, Affine(width, d_model, bias=False)])
        self.D = nn.Parameter(torch.empty(d_model))
        self.out_proj = Linear(d_model, d_model)
        self._kept = Kept()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        c = self.config
        linear_(self.in_proj)
        self.conv1d.reset_parameters()
        exact: dict[str, Any] = {"dtype": torch.float64, "device": self.D.device}
        bands = (c.d_position - 1) // 2
        frequencies = 2 * math.pi / c.l_max * torch.linspace(1e-4, bands - 1, bands, **exact)
        angle = torch.arange(c.l_max, **exact)[:, None] * frequencies
        fill_(self.positions, torch.cat([self._time()[:, None], angle.cos(), -angle.sin()], 1))
        fill_(self.frequency, c.frequency)
        for layer in self.filter:
            assert isinstance(layer, Affine)
            linear_(layer)
        normal_(self.D, 1.0)
        linear_(self.out_proj, self.residual_scale)

    def param_groups(self) -> list[tuple[list[str], dict[str, Any]]]:
        lr = {} if self.config.lr is None else {"lr": self.config.lr}
        network = [f"filter.{name}" for name, _ in self.filter.named_parameters()]
        return [
            (["frequency", "D", *network], {"weight_decay": 0.0} | lr),
            (["positions"], {"weight_decay": 0.0, "lr": self.config.lr_position}),
        ]

    def kernel(self) -> Tensor:
        """(d_model, l_max) float32 (float64 for float64 parameters)."""
        return self._kept("kernel", None, self._sources(), self._make)

    def _sources(self) -> list[Tensor]:
        return [self.positions, self.frequency, *self.filter.parameters()]

    def _make(self) -> Tensor:
        c, h = self.config, wide(self.positions)
        weights = [cast(Affine, layer).weight for layer in self.filter]
        biases = [cast(Tensor, cast(Affine, layer).bias) for layer in self.filter[:-1]]
        with torch.autocast(h.device.type, enabled=False):
            for weight, bias in zip(weights[:-1], biases):
                h = torch.sin(wide(self.frequency) * F.linear(h, wide(weight), wide(bias)))
            kernel = wide(weights[-1]) @ h.T
            decay = torch.linspace(1 / c.slow_decay, 1 / c.fast_decay, self.d_model, device=h.device, dtype=h.dtype)
            window = torch.exp(math.log(1e-2) * decay[:, None] * self._time().to(h.dtype))
            return kernel * (window + c.shift)

    def _time(self) -> Tensor:
        """(l_max,) from 0 to 1."""
        return torch.linspace(0, 1, self.config.l_max, dtype=torch.float64, device=self.D.device)

    def forward(
        self, x: Tensor, state: HyenaState | None = None, seq: SequenceInfo | None = None
    ) -> tuple[Tensor, HyenaState]:
        self.check(x, seq)
        mixed, conv = self.conv1d(self.in_proj(x), None if state is None else state.conv, seq)
        past = None if state is None else state.stream.past().to(mixed.dtype)
        backend = self.backend("long_conv")

        def gated(mixed: Tensor, kernel: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
            g, k, v = mixed.chunk(3, -1)
            y, inputs = long_conv(k * v, kernel, D=self.D, initial_state=past, seq=seq, backend=backend)
            assert inputs is not None
            return g * y, inputs

        given = mixed, self.kernel(), past
        # What is between the gates is made again in the backward pass: one convolution more, two tensors fewer to keep.
        y, inputs = recomputed(gated, *given)
        return self.out_proj(y), HyenaState(conv, InputsState(inputs.to(conv.dtype)))

    def step(self, x: Tensor, state: HyenaState) -> tuple[Tensor, HyenaState]:
        online = self._kept("online", None, [*self._sources(), self.D], lambda: OnlineConv(self.kernel(), self.D))
        g, k, v = self.conv1d.step(self.in_proj(x), state.conv).chunk(3, -1)
        return self.out_proj(g * state.stream.step(k * v, online)), state

    def initial_state(
        self,
        batch: int,
        max_seqlen: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> HyenaState:
        device, dtype = device or self.D.device, dtype or self.D.dtype
        inputs = torch.zeros(batch, self.config.l_max - 1, self.d_model, device=device, dtype=dtype)
        return HyenaState(self.conv1d.initial_state(batch, device, dtype), InputsState(inputs))

    def state_bytes(self, batch: int, seqlen: int) -> int:
        rows = 3 * (self.config.d_conv - 1) + self.config.l_max - 1
        return batch * rows * self.d_model * self.D.element_size()
