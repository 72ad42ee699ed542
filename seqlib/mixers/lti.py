"""What the time-invariant mixers share: a convolution whose kernel parameters make, a state at its ends, a readout."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqlib.errors import ConfigError, UnsupportedInput
from seqlib.layers.binding import bound
from seqlib.layers.init import fill_, normal_
from seqlib.layers.kept import Kept
from seqlib.layers.lti import Diagonal, Recurrence, add_carried, final_state
from seqlib.layers.readout import Readout
from seqlib.mixers.base import Mixer, MixerConfig, positive, wide, wide_complex
from seqlib.ops import long_conv
from seqlib.ops.diagonal_step import bind
from seqlib.sequence import SequenceInfo, State

__all__ = ["ConvConfig", "NoState", "SSMConfig", "SSMState", "TimeInvariant", "as_real", "refuse_state"]

# Kernels of more numbers than this are made again in every pass instead of kept (64 MiB).
KEEP = 1 << 24


@dataclass(frozen=True, kw_only=True)
class ConvConfig(MixerConfig):
    """Hyperparameters of every mixer that is a long convolution and a readout."""

    bidirectional: bool = False
    """A second kernel reads what follows; such a layer has no state to go on from."""
    activation: str = "gelu"
    """After the convolution: "gelu", "silu", "relu" or "none"."""
    output: str = "glu"
    """How channels are mixed then: "glu", "linear", "half_glu1", "half_glu2" or "none" (see `layers.readout`)."""
    lr: float | None = 1e-3
    """Learning rate of the parameters of the kernel; None is that of the model."""

    def kernel_groups(self, *names: str) -> list[tuple[list[str], dict[str, Any]]]:
        """`param_groups` for the parameters of the kernel: no weight decay, and `lr`."""
        return [(list(names), {"weight_decay": 0.0} | ({} if self.lr is None else {"lr": self.lr}))]


@dataclass(frozen=True, kw_only=True)
class SSMConfig(ConvConfig):
    """Hyperparameters of every mixer with a continuous-time state space per channel."""

    d_state: int = 64
    """Real states per channel; complex ones come in conjugate pairs, so half as many are stored. Even."""
    pairs: ClassVar[bool] = True
    n_ssm: int = 1
    """Different A and B among the channels; channel i has number i % n_ssm."""
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    """dt starts log-uniform in [dt_min, dt_max]."""
    dt_transform: str = "softplus"
    """dt = softplus(inv_dt), or exp(inv_dt) as in checkpoints of 2022."""
    rate: float = 1.0
    """Multiplies dt: 2 runs a trained layer on inputs of half the sample rate. `mixer.rate` may be set at any time."""

    def __post_init__(self) -> None:
        positive(self, "d_state", "n_ssm")
        if self.pairs and self.d_state % 2:
            raise ConfigError(f"{self.kind}: d_state must be even (conjugate pairs), got {self.d_state}")
        if not 0 < self.dt_min <= self.dt_max:
            raise ConfigError(f"{self.kind}: need 0 < dt_min <= dt_max, got {self.dt_min} and {self.dt_max}")
        if self.dt_transform not in ("softplus", "exp"):
            raise ConfigError(f"{self.kind}: dt_transform must be 'softplus' or 'exp', got {self.dt_transform!r}")
        if not self.rate > 0:
            raise ConfigError(f"{self.kind}: rate must be positive, got {self.rate}")


@dataclass
class SSMState(State):
    """ssm: (batch, d_model, states), float32 or complex64."""

    ssm: Tensor

    @classmethod
    def later(cls, make: Callable[[], Tensor]) -> SSMState:
        """A state that is made when somebody looks at it: a training step does not, and would pay a third for it."""
        state = cls.__new__(cls)
        vars(state)["make"] = make
        return state

    def __getattr__(self, name: str) -> Tensor:
        make = vars(self).pop("make", None) if name == "ssm" else None
        if make is None:
            raise AttributeError(name)
        with torch.enable_grad():
            self.ssm = make()
        return self.ssm


@dataclass
class NoState(State):
    """What a bidirectional layer leaves: nothing to go on from."""


C = TypeVar("C", bound=SSMConfig)


class TimeInvariant(Mixer[C]):
    """Base of mixers with a state space per channel.

        y = readout(conv(x, kernel) + D x),  kernel[l] = C A_bar^l B_bar

    Subclasses make the kernel and the recurrence behind it from `sources`, their parameters. While no gradient is
    recorded both are kept until a parameter changes. A bidirectional layer has two C over one A, B and dt; its reverse
    kernel begins at lag -1 (see `ops.long_conv`).
    """

    supports: ClassVar[frozenset[str]] = frozenset({"packed", "padded", "initial_state", "bidirectional"})

    def __init__(self, config: C, d_model: int, **place: Any) -> None:
        super().__init__(config, d_model, **place)
        if d_model % config.n_ssm:
            raise ConfigError(f"{config.kind}: n_ssm must divide d_model={d_model}, got {config.n_ssm}")
        self.rate = config.rate
        self.inv_dt = nn.Parameter(torch.empty(d_model))
        self.D = nn.Parameter(torch.empty(d_model))
        self.readout = Readout(d_model, config.activation, config.output, self.residual_scale)
        self._kept = Kept()

    @property
    def directions(self) -> int:
        return 2 if self.config.bidirectional else 1

    def sources(self) -> Sequence[Tensor]:
        """The parameters that the kernel depends on."""
        raise NotImplementedError

    def make_kernel(self, length: int) -> Tensor:
        """(directions, d_model, length) float32 (float64 for float64 parameters)."""
        raise NotImplementedError

    def make_system(self) -> Recurrence:
        """The recurrence of the forward kernel."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        c = self.config
        low, high = math.log(c.dt_min), math.log(c.dt_max)
        log_dt = torch.rand(self.d_model, device=self.D.device).mul(high - low).add(low)
        start = log_dt if c.dt_transform == "exp" else torch.log(torch.expm1(log_dt.exp()))
        fill_(self.inv_dt, start.view(-1, *[1] * (self.inv_dt.dim() - 1)))
        normal_(self.D, 1.0)
        self.readout.reset_parameters()

    def dt(self) -> Tensor:
        """(d_model,) step sizes at the present rate."""
        inv_dt = wide(self.inv_dt)
        return (F.softplus(inv_dt) if self.config.dt_transform == "softplus" else inv_dt.exp()) * self.rate

    def shared(self, parameter: Tensor) -> Tensor:
        """(..., n_ssm, d_state) as (..., d_model, d_state)."""
        return parameter.repeat(*[1] * (parameter.dim() - 2), self.d_model // self.config.n_ssm, 1)

    def forward(
        self, x: Tensor, state: SSMState | None = None, seq: SequenceInfo | None = None
    ) -> tuple[Tensor, SSMState | NoState]:
        self.check(x, seq)
        if self.config.bidirectional:
            refuse_state(self.config, state)
        kernel = self.kernel(x.shape[1])
        y, _ = long_conv(
            x, kernel[0], D=self.D, reverse_kernel=kernel[1] if self.config.bidirectional else None, seq=seq,
            backend=self.backend("long_conv"),
        )  # fmt: skip
        if self.config.bidirectional:
            return self.readout(y), NoState()
        system, before = self.system(), None if state is None else state.ssm
        if before is not None:
            y = add_carried(y, system.outputs(before, x.shape[1]), seq)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return self.readout(y), SSMState.later(lambda: final_state(system, x, before, seq).contiguous())
        return self.readout(y), SSMState(final_state(system, x, before, seq).contiguous())

    def step(self, x: Tensor, state: SSMState) -> tuple[Tensor, SSMState]:
        system = self._kept("step", self.rate, self.sources(), self._recurrence)
        run = bound(
            self, lambda: bind(x, *system, self.D, state.ssm, backend=self.backend("diagonal_step")), x, state.ssm
        )
        return self.readout(run(x, *system, self.D, state.ssm)), state

    def _recurrence(self) -> tuple[Tensor, Tensor, Tensor]:
        """Decays in the dtype of the state, and B_bar and C as real numbers, for diagonal systems."""
        _, dtype = self.state_shape()
        system = self.make_system()
        assert isinstance(system, Diagonal)
        C = (2 if system.pairs else 1) * system.C.detach().to(dtype)
        if dtype.is_complex:
            C = C.conj().resolve_conj()
        B_bar = system.B_bar.detach().to(dtype).contiguous()
        return system.log_decay.detach().exp().to(dtype).contiguous(), as_real(B_bar), as_real(C.contiguous())

    def kernel(self, length: int) -> Tensor:
        if length * self.d_model > KEEP:
            return self.make_kernel(length)
        return self._kept("kernel", (length, self.rate), self.sources(), lambda: self.make_kernel(length))

    def system(self) -> Recurrence:
        return self._kept("system", self.rate, self.sources(), self.make_system)

    def state_shape(self) -> tuple[int, torch.dtype]:
        """States per channel and their dtype."""
        return self.config.d_state // 2, wide_complex(self.D)

    def initial_state(
        self,
        batch: int,
        max_seqlen: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> SSMState:
        if self.config.bidirectional:
            raise UnsupportedInput(f"{self.config.kind} with bidirectional=True has no state and cannot decode")
        n, dtype = self.state_shape()
        return SSMState(torch.zeros(batch, self.d_model, n, dtype=dtype, device=device or self.D.device))

    def state_bytes(self, batch: int, seqlen: int) -> int:
        n, dtype = self.state_shape()
        return 0 if self.config.bidirectional else batch * self.d_model * n * dtype.itemsize


def refuse_state(config: MixerConfig, state: object) -> None:
    """A bidirectional layer cannot go on from a state, except from the empty one that it leaves."""
    if state is not None and not isinstance(state, NoState):
        raise UnsupportedInput(
            f"{config.kind} with bidirectional=True takes no state: earlier outputs would need these inputs; "
            "give the whole sequence at once"
        )


def as_real(h: Tensor) -> Tensor:
    """(..., n) complex as (..., 2n) real numbers in the same memory."""
    return torch.view_as_real(h).view(*h.shape[:-1], -1) if h.is_complex() else h
