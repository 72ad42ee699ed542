"""S4: a state space per channel whose matrix is diagonal plus low rank, run as a convolution."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from seqlib.errors import ConfigError, UnsupportedInput
from seqlib.layers.hippo import MEASURES, nplr
from seqlib.layers.init import fill_
from seqlib.layers.lti import LowRank
from seqlib.mixers.base import MixerConfig, positive, wide, wide_dtype
from seqlib.mixers.lti import NoState, SSMConfig, SSMState, TimeInvariant, as_real
from seqlib.ops import ssm_kernel_dplr
from seqlib.ops.ssm_kernel import dplr_dense, dplr_recurrence, dplr_truncate
from seqlib.sequence import SequenceInfo

__all__ = ["S4", "S4Config"]


@dataclass(frozen=True, kw_only=True)
class S4Config(SSMConfig):
    """Hyperparameters of `S4`; the defaults are those of state-spaces/s4 (configs/model/layer/s4.yaml)."""

    kind: str = "s4"
    init: str = "legs"
    """HiPPO measure that A and B start from: "legs", "legt" (rank 2) or "fourier"."""
    l_max: int = 1024
    """Positions that C starts truncated for: the length of the sequences to train on. See `S4.extend`."""
    B_clip: float | None = 2.0
    """Bound of the entries of B at the start, in the eigenbasis."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "l_max")
        if self.init not in MEASURES:
            raise ConfigError(f"s4: init must be one of {', '.join(MEASURES)}, got {self.init!r}")


class _Step(NamedTuple):
    """`dplr_recurrence` and the readout of its states, all but the decay as real numbers (..., 2n)."""

    decay: Tensor
    q: Tensor
    r: Tensor
    B_bar: Tensor
    C: Tensor


class S4(TimeInvariant[S4Config]):
    """A state space per channel that starts as HiPPO.

        h' = (diag(A) - P P*) h + B x,  y = 2 Re(C' h) + D x,  A = -exp(A_log) + i A_imag,  bilinear with dt
        out = glu(W gelu(y) + b)

    **`C` holds the readout of the truncated kernel**, C' (1 - A_bar^l_kernel), as S4 trains and stores it; the buffer
    `l_kernel` says for how many positions. Causal layers run longer sequences in parts of that length and hand the
    state on, which costs dense matrices of (d_state)^2 per channel; `extend` rewrites C for another length.

    Source: Gu et al. 2022 (arXiv 2111.00396) and, for legt and fourier, arXiv 2206.12037; state-spaces/s4,
    models/s4/s4.py (SSMKernelDPLR, S4Block), which stores -Im A.
    """

    Config: ClassVar[type[MixerConfig]] = S4Config
    l_kernel: Tensor

    def __init__(self, config: S4Config, d_model: int, **place: Any) -> None:
        super().__init__(config, d_model, **place)
        n, rank = config.d_state // 2, 2 if config.init == "legt" else 1
        self.A_log = nn.Parameter(torch.empty(config.n_ssm, n))
        self.A_imag = nn.Parameter(torch.empty(config.n_ssm, n))
        self.P = nn.Parameter(torch.empty(rank, config.n_ssm, n, 2))
        self.B = nn.Parameter(torch.empty(config.n_ssm, n, 2))
        self.C = nn.Parameter(torch.empty(self.directions, d_model, n, 2))
        self.register_buffer("l_kernel", torch.empty((), dtype=torch.long))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        c = self.config
        start = nplr(c.init, c.d_state)
        B = start.B if c.B_clip is None else start.B.real.clamp(max=c.B_clip).to(start.B.dtype)
        fill_(self.A_log, torch.log((-start.A.real).clamp(min=1e-4)))
        fill_(self.A_imag, start.A.imag)
        fill_(self.P, torch.view_as_real(start.P)[:, None])
        fill_(self.B, torch.view_as_real(B))
        fill_(self.l_kernel, c.l_max)
        if not self.C.is_meta:
            with torch.no_grad():
                A, P, _, _ = self._matrices()
                plain = torch.randn(self.C.shape[:-1], dtype=torch.complex64, device=self.C.device)
                fill_(self.C, torch.view_as_real(dplr_truncate(A, P, plain, self.dt() / self.rate, c.l_max)))

    @torch.no_grad()
    def extend(self, length: int) -> None:
        """Rewrite `C` for `length` positions; the kernel stays what it is. An optimizer's moments of C do not follow.

        A trained layer may be taken to longer sequences with it, and must be if it is bidirectional.
        """
        if length < 1:
            raise UnsupportedInput(f"length must be at least 1, got {length}")
        A, P, B, C = self._matrices()
        re, im = dplr_dense(A, P, B, C, self.dt() / self.rate, int(self.l_kernel)).C.chunk(2, -1)
        self.truncate(length, torch.complex(re, -im) / 2)

    @torch.no_grad()
    def truncate(self, length: int, plain: Tensor | None = None) -> None:
        """Store a plain readout, complex (directions, d_model, d_state / 2), for `length` positions; None is `C`."""
        A, P, _, C = self._matrices()
        C = dplr_truncate(A, P, C if plain is None else plain, self.dt() / self.rate, length)
        self.C.copy_(torch.view_as_real(C))
        self.l_kernel.fill_(length)

    def param_groups(self) -> list[tuple[list[str], dict[str, Any]]]:
        return self.config.kernel_groups("inv_dt", "A_log", "A_imag", "P", "B")

    def sources(self) -> Sequence[Tensor]:
        return [self.inv_dt, self.A_log, self.A_imag, self.P, self.B, self.C, self.l_kernel]

    @property
    def positions(self) -> int:
        """Positions of the truncated kernel at the present rate."""
        return max(1, round(int(self.l_kernel) / self.rate))

    def forward(
        self, x: Tensor, state: SSMState | None = None, seq: SequenceInfo | None = None
    ) -> tuple[Tensor, SSMState | NoState]:
        limit = self.positions
        if x.dim() != 3 or x.shape[1] <= limit:
            return super().forward(x, state, seq)
        if self.config.bidirectional:
            raise UnsupportedInput(
                f"s4 has a kernel of {limit} positions in both directions, got a sequence of {x.shape[1]}; "
                "call mixer.extend(length), or set l_max before training"
            )
        self.check(x, seq)
        ys: list[Tensor] = []
        for begin in range(0, x.shape[1], limit):
            y, after = super().forward(x[:, begin : begin + limit], state, _cut(seq, begin, begin + limit))
            assert isinstance(after, SSMState)
            state = after
            ys.append(y)
        assert state is not None
        return torch.cat(ys, 1), state

    def make_kernel(self, length: int) -> Tensor:
        dt = self.dt()
        if self.config.init == "legs":
            return ssm_kernel_dplr(*self._matrices(), dt, length, l_kernel=self.positions)
        # The poles of legt and fourier start 1e-4 dt from the unit circle, where float32 loses the gradients.
        return ssm_kernel_dplr(*self._matrices(), dt.double(), length, l_kernel=self.positions).to(dt.dtype)

    def make_system(self) -> LowRank:
        A, P, B, C = self._matrices()
        return LowRank(A, P, B, C[0], self.dt(), self.positions)

    def _matrices(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A, P, B of every channel and C, complex."""
        A = torch.complex(-torch.exp(wide(self.A_log)), wide(self.A_imag))
        P, B, C = (torch.view_as_complex(wide(p)) for p in (self.P, self.B, self.C))
        return self.shared(A), self.shared(P), self.shared(B), C

    def step(self, x: Tensor, state: SSMState) -> tuple[Tensor, SSMState]:
        s = self._kept("step", self.rate, self.sources(), self._low_rank)
        u = x.to(wide_dtype(self.D))
        flat = as_real(state.ssm)
        low = [-(flat * row).sum(-1, keepdim=True) for row in s.r]
        state.ssm.mul_(s.decay)
        flat.addcmul_(s.B_bar, u[..., None])
        for column, amount in zip(s.q, low):
            flat.addcmul_(column, amount)
        return self.readout(((flat * s.C).sum(-1) + self.D * u).to(x.dtype)), state

    def _low_rank(self) -> _Step:
        A, P, B, C = self._matrices()
        decay, q, r, B_bar = dplr_recurrence(A, P, B, self.dt())
        re, im = dplr_dense(A, P, B, C[0], self.dt(), self.positions).C.chunk(2, -1)
        _, dtype = self.state_shape()
        return _Step(
            decay.to(dtype),
            as_real(q.to(dtype)),
            as_real(r.to(dtype).conj().resolve_conj()),  # Re(r h) = Re r Re h - Im r Im h
            as_real(B_bar.to(dtype)),
            torch.stack([re, im], -1).flatten(-2).to(wide_dtype(self.D)),
        )


def _cut(seq: SequenceInfo | None, begin: int, end: int) -> SequenceInfo | None:
    if seq is None:
        return None
    starts, real = (None if t is None else t[:, begin:end] for t in (seq.starts, seq.padding_mask))
    return dataclasses.replace(seq, starts=starts, padding_mask=real)
