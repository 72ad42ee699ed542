"""What LRU and S5 share: one diagonal state space that all channels write to and read from, run as a scan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqlib.errors import UnsupportedInput
from seqlib.layers.init import normal_
from seqlib.layers.kept import Kept
from seqlib.layers.readout import Readout
from seqlib.mixers.base import Mixer, wide_complex
from seqlib.mixers.lti import ConvConfig, NoState, SSMState, as_real, refuse_state
from seqlib.ops import linear_scan
from seqlib.sequence import SequenceInfo

__all__ = ["SharedState"]

C = TypeVar("C", bound=ConvConfig)


class SharedState(Mixer[C]):
    """Base of mixers with one complex diagonal state space for all channels.

        h_t = decay h_{t-1} + B_bar x_t,  y_t = Re(C h_t) + D x_t,  out = readout(y)

    A bidirectional layer scans the same inputs from the right as well and reads those states with a second C; both
    scans include the current input, as in S5.
    """

    supports: ClassVar[frozenset[str]] = frozenset({"packed", "padded", "initial_state", "bidirectional"})

    def __init__(self, config: C, d_model: int, states: int, **place: Any) -> None:
        super().__init__(config, d_model, **place)
        self.states = states
        self.rate = 1.0
        self.B = nn.Parameter(torch.empty(states, d_model, 2))
        self.C = nn.Parameter(torch.empty(2 if config.bidirectional else 1, d_model, states, 2))
        self.D = nn.Parameter(torch.empty(d_model))
        self.readout = Readout(d_model, config.activation, config.output, self.residual_scale)
        self._kept = Kept()

    def sources(self) -> Sequence[Tensor]:
        """The parameters that `recurrence` depends on."""
        raise NotImplementedError

    def recurrence(self) -> tuple[Tensor, Tensor, Tensor]:
        """decay (states,), B_bar (states, d_model) and C (directions, d_model, states), complex64 or complex128."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        normal_(self.D, 1.0)
        self.readout.reset_parameters()

    def forward(
        self, x: Tensor, state: SSMState | None = None, seq: SequenceInfo | None = None
    ) -> tuple[Tensor, SSMState | NoState]:
        self.check(x, seq)
        if self.config.bidirectional:
            refuse_state(self.config, state)
            state = None
        decay, into, out = self._maps()
        u = _as_complex(F.linear(x, into.to(x.dtype)), decay)
        backend = self.backend("linear_scan")
        before = None if state is None else state.ssm
        h, last = linear_scan(decay, u, initial_state=before, seq=seq, backend=backend)
        seen = as_real(h)
        if self.config.bidirectional:
            h, _ = linear_scan(decay, u, reverse=True, seq=seq, backend=backend)
            seen = torch.cat([seen, as_real(h)], -1)
        y = F.linear(seen.to(x.dtype), out.to(x.dtype)) + self.D * x
        return self.readout(y.to(x.dtype)), NoState() if self.config.bidirectional else SSMState(last)

    def step(self, x: Tensor, state: SSMState) -> tuple[Tensor, SSMState]:
        decay, into, out = self._maps()
        u = x.to(into.dtype)
        h = as_real(state.ssm.mul_(decay)).add_(F.linear(u, into))
        return self.readout((F.linear(h, out) + self.D * u).to(x.dtype)), state

    def _maps(self) -> tuple[Tensor, Tensor, Tensor]:
        """The decay and two real matrices: into the states (2 states, d_model), and out of those of all directions."""
        return self._kept("maps", self.rate, self.sources(), self._make_maps)

    def _make_maps(self) -> tuple[Tensor, Tensor, Tensor]:
        decay, B_bar, C = self.recurrence()
        into = torch.view_as_real(B_bar).transpose(1, 2).flatten(0, 1)
        out = torch.view_as_real(C.conj().resolve_conj()).flatten(2)  # Re(C h) = Re C Re h - Im C Im h
        return decay, into, torch.cat(out.unbind(0), -1)

    def initial_state(
        self,
        batch: int,
        max_seqlen: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> SSMState:
        if self.config.bidirectional:
            raise UnsupportedInput(f"{self.config.kind} with bidirectional=True has no state and cannot decode")
        wide = wide_complex(self.D)
        return SSMState(torch.zeros(batch, self.states, dtype=wide, device=device or self.D.device))

    def state_bytes(self, batch: int, seqlen: int) -> int:
        return 0 if self.config.bidirectional else batch * self.states * wide_complex(self.D).itemsize


def _as_complex(pairs: Tensor, like: Tensor) -> Tensor:
    """(..., 2n) real numbers as (..., n) complex ones in the dtype of `like`."""
    return torch.view_as_complex(pairs.to(torch.view_as_real(like).dtype).unflatten(-1, (-1, 2)))
