"""SGConv: a long convolution whose kernel is coarser and smaller the further it looks back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqlib.errors import ConfigError, UnsupportedInput
from seqlib.layers.init import fill_, normal_
from seqlib.layers.kept import Kept
from seqlib.layers.readout import Readout
from seqlib.layers.stream import InputsState
from seqlib.mixers.base import Mixer, MixerConfig, positive, wide
from seqlib.mixers.lti import ConvConfig, NoState, refuse_state
from seqlib.ops import long_conv
from seqlib.ops.long_conv import OnlineConv, SparseConv
from seqlib.sequence import SequenceInfo

__all__ = ["SGConv", "SGConvConfig"]

# Up to this many bends of the kernel decoding sums over them; `OnlineConv` needs about as much work with more.
SPARSE = 64

_MOST_SCALES = 40  # each doubles the lags


@dataclass(frozen=True, kw_only=True)
class SGConvConfig(ConvConfig):
    """Hyperparameters of `SGConv`; the defaults are those of ctlllll/SGConv."""

    kind: str = "sgconv"
    l_max: int = 1024
    """The kernel covers at least this many lags; it ends where its last scale does."""
    kernel_dim: int = 64
    """Parameters per scale, channel and direction."""
    init_scale: int = 0
    """The finest scale is stretched by 2^init_scale."""
    n_scales: int | None = None
    """None is 1 + ceil(log2(l_max / kernel_dim)) - init_scale."""
    combine: str = "cat"
    """"cat" lays the scales end to end (the paper); "sum" starts all at lag 0."""
    kernel_init: str = "randn"
    """"randn" N(0, 1), or "cos": cosines of rising frequency, dealt to the channels at random."""
    interpolation: str = "linear"
    """"linear" or "nearest"."""
    decay: str = "scale"
    """"scale": scale i is multiplied by m^(n_scales - 1 - i), m from decay_min to decay_max over the channels.
    "power": the kernel is multiplied by (lag + 1)^-p, p drawn from U(decay_min, decay_max) and learned;
    "fixed_power": the same with p fixed."""
    decay_min: float = 2.0
    decay_max: float = 2.0

    def __post_init__(self) -> None:
        positive(self, "l_max", "kernel_dim", "n_scales")
        if not isinstance(self.init_scale, int) or self.init_scale < 0:
            raise ConfigError(f"sgconv: init_scale must be a non-negative integer, got {self.init_scale!r}")
        known = {
            "combine": ("cat", "sum"),
            "kernel_init": ("randn", "cos"),
            "interpolation": ("linear", "nearest"),
            "decay": ("scale", "power", "fixed_power"),
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ConfigError(f"sgconv: {name} must be one of {', '.join(values)}, got {getattr(self, name)!r}")
        if not 0 < self.decay_min <= self.decay_max:
            raise ConfigError(f"sgconv: need 0 < decay_min <= decay_max, got {self.decay_min} and {self.decay_max}")
        if self.scales > _MOST_SCALES:
            raise ConfigError(f"sgconv: n_scales must be at most {_MOST_SCALES}, got {self.scales}")
        if self.scales < 1:
            raise ConfigError(
                f"sgconv: l_max={self.l_max} leaves {self.scales} scales of kernel_dim={self.kernel_dim} and "
                f"init_scale={self.init_scale}; make l_max longer or kernel_dim smaller"
            )

    @property
    def scales(self) -> int:
        return self.n_scales or 1 + math.ceil(math.log2(self.l_max / self.kernel_dim)) - self.init_scale

    @property
    def lengths(self) -> list[int]:
        """Lags of every scale."""
        first = 1 if self.combine == "cat" else 0
        return [self.kernel_dim << max(0, i - first) + self.init_scale for i in range(self.scales)]

    @property
    def length(self) -> int:
        """Lags of the kernel."""
        return sum(self.lengths) if self.combine == "cat" else self.lengths[-1]


class SGConv(Mixer[SGConvConfig]):
    """A convolution with a kernel of few parameters on many scales.

        k = cat_i m^(n_scales - 1 - i) stretch_i(w_i),  stretched to d, d, 2d, 4d, ... lags, d = kernel_dim
        y = conv(x, k / norm) + D x,  out = glu(W gelu(y) + b)

    `norm` is the size of k at the start, per channel, and stays; it is a buffer. The reverse kernel of a bidirectional
    layer begins at lag -1. Weight decay does act on the kernel.

    State: the last `length - 1` inputs; see `InputsState`. There is no recurrence of finite size, but scales are made
    of straight pieces, so with few parameters per scale decoding costs as much as the kernel has bends.

    Source: Li et al. 2022 (arXiv 2210.09298), section 3; ctlllll/SGConv, gconv_standalone.py, whose `norm` is taken in
    the first forward pass.
    """

    Config: ClassVar[type[MixerConfig]] = SGConvConfig
    supports: ClassVar[frozenset[str]] = frozenset({"packed", "padded", "initial_state", "bidirectional"})
    kernel_norm: Tensor
    powers: Tensor

    def __init__(self, config: SGConvConfig, d_model: int, **place: Any) -> None:
        super().__init__(config, d_model, **place)
        directions = 2 if config.bidirectional else 1
        self.kernels = nn.Parameter(torch.empty(config.scales, directions, d_model, config.kernel_dim))
        self.D = nn.Parameter(torch.empty(d_model))
        self.register_buffer("kernel_norm", torch.empty(directions, d_model, 1))
        if config.decay == "power":
            self.powers = nn.Parameter(torch.empty(d_model))
        elif config.decay == "fixed_power":
            self.register_buffer("powers", torch.empty(d_model))
        self.readout = Readout(d_model, config.activation, config.output, self.residual_scale)
        self._kept = Kept()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        c = self.config
        if c.kernel_init == "randn":
            normal_(self.kernels, 1.0)
        else:
            device = self.kernels.device  # named, because transformers loads with a default of its own
            at = torch.linspace(0, 2 * math.pi, c.kernel_dim, device=device)
            waves = torch.cos(at * torch.arange(self.d_model, device=device)[:, None])
            dealt = torch.stack([waves[torch.randperm(self.d_model, device=device)] for _ in range(c.scales)])
            fill_(self.kernels, dealt[:, None])
        if c.decay != "scale":
            fill_(self.powers, torch.rand(self.d_model).mul(c.decay_max - c.decay_min).add(c.decay_min))
        normal_(self.D, 1.0)
        self.readout.reset_parameters()
        with torch.no_grad():
            fill_(self.kernel_norm, self._whole(wide(self.kernels)).norm(dim=-1, keepdim=True))

    def param_groups(self) -> list[tuple[list[str], dict[str, Any]]]:
        names = ["kernels"] + (["powers"] if self.config.decay == "power" else [])
        return [] if self.config.lr is None else [(names, {"lr": self.config.lr})]

    def kernel(self) -> Tensor:
        """(directions, d_model, length) float32 (float64 for float64 parameters)."""
        return self._kept(
            "kernel", None, self._sources(), lambda: self._whole(wide(self.kernels)) / wide(self.kernel_norm)
        )

    def _sources(self) -> list[Tensor]:
        return [self.kernels, self.kernel_norm, *([] if self.config.decay == "scale" else [self.powers])]

    def _whole(self, scales: Tensor) -> Tensor:
        c = self.config
        linear = c.interpolation == "linear"
        parts = [
            F.interpolate(w, size=n, mode=c.interpolation, align_corners=False if linear else None)
            for w, n in zip(scales, c.lengths)
        ]
        if c.decay == "scale":
            m = torch.linspace(c.decay_min, c.decay_max, self.d_model, dtype=scales.dtype, device=scales.device)
            parts = [part * m[:, None] ** (c.scales - 1 - i) for i, part in enumerate(parts)]
        if c.combine == "cat":
            kernel = torch.cat(parts, -1)
        else:
            kernel = torch.stack([F.pad(part, (0, c.length - part.shape[-1])) for part in parts]).sum(0)
        if c.decay == "scale":
            return kernel
        lag = torch.arange(1, c.length + 1, dtype=scales.dtype, device=scales.device)
        return kernel * lag ** -wide(self.powers)[:, None]

    def forward(
        self, x: Tensor, state: InputsState | None = None, seq: SequenceInfo | None = None
    ) -> tuple[Tensor, InputsState | NoState]:
        self.check(x, seq)
        kernel = self.kernel()
        backend = self.backend("long_conv")
        if self.config.bidirectional:
            refuse_state(self.config, state)
            y, _ = long_conv(x, kernel[0], D=self.D, reverse_kernel=kernel[1], seq=seq, backend=backend)
            return self.readout(y), NoState()
        past = None if state is None else state.past()
        y, inputs = long_conv(x, kernel[0], D=self.D, initial_state=past, seq=seq, backend=backend)
        assert inputs is not None
        return self.readout(y), InputsState(inputs)

    def step(self, x: Tensor, state: InputsState) -> tuple[Tensor, InputsState]:
        conv = self._kept("online", None, [*self._sources(), self.D], self._make_online)
        return self.readout(state.step(x, conv)), state

    def _make_online(self) -> OnlineConv | SparseConv:
        if self.config.decay == "scale":
            sparse = SparseConv(self._whole(self.kernels.double())[0] / self.kernel_norm[0].double(), self.D)
            if len(sparse.taps) <= SPARSE:
                return sparse
        return OnlineConv(self.kernel()[0], self.D)

    def initial_state(
        self,
        batch: int,
        max_seqlen: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> InputsState:
        if self.config.bidirectional:
            raise UnsupportedInput("sgconv with bidirectional=True has no state and cannot decode")
        shape = (batch, self.config.length - 1, self.d_model)
        return InputsState(torch.zeros(shape, dtype=dtype or self.D.dtype, device=device or self.D.device))

    def state_bytes(self, batch: int, seqlen: int) -> int:
        if self.config.bidirectional:
            return 0
        return batch * (self.config.length - 1) * self.d_model * self.D.element_size()
