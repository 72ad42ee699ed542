"""Mixers made of mixers: parallel heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from seqlib.errors import ConfigError
from seqlib.layers.init import fill_
from seqlib.layers.linear import Linear
from seqlib.mixers.base import Mixer, MixerConfig
from seqlib.sequence import SequenceInfo, State

__all__ = ["Sum", "SumConfig", "SumState"]


@dataclass(frozen=True, kw_only=True)
class SumConfig(MixerConfig):
    """Hyperparameters of `Sum`."""

    kind: str = "sum"
    mixers: tuple[MixerConfig, ...] = ()
    """At least two, as configs or as plain values with a `kind`."""
    gate: bool = False
    """Weigh each mixer by a sigmoid of the input; otherwise they are simply added."""
    in_scales: tuple[float, ...] | None = None
    out_scales: tuple[float, ...] | None = None
    """Factors of what each mixer reads and gives (Falcon-H1); None is 1."""

    def __post_init__(self) -> None:
        from seqlib.mixers import mixer_config  # the table of all mixers, this one included

        if isinstance(self.mixers, Mapping) or len(self.mixers) < 2:
            raise ConfigError(f"sum: mixers must be a list of at least two configs, got {self.mixers!r}")
        object.__setattr__(self, "mixers", tuple(mixer_config(m) for m in self.mixers))
        for name in ("in_scales", "out_scales"):
            scales = getattr(self, name)
            if scales is not None:
                object.__setattr__(self, name, tuple(scales))
                if len(scales) != len(self.mixers):
                    raise ConfigError(f"sum: {name} must have one factor per mixer, got {scales}")

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"mixers": [m.to_dict() for m in self.mixers]}


@dataclass
class SumState(State):
    """The states of the mixers, in their order."""

    states: tuple[Any, ...]


class Sum(Mixer[SumConfig]):
    """Mixers side by side on the same input.

        y = sum_i mixer_i(x),   or with gate   y = sum_i sigmoid(gate(x))_i mixer_i(x)

    The gate starts at 1/2 for all. What the sum supports is what all of its mixers support.

    Source: parallel heads as in Falcon-H1 (Zuo et al. 2025, arXiv 2507.22448), section 2, and Hymba (Dong et al. 2024,
    arXiv 2411.13676).
    """

    Config: ClassVar[type[MixerConfig]] = SumConfig
    # Such layers pair attention with a recurrence, so room for keys and values is made.
    layer_type: ClassVar[str] = "full_attention"

    def __init__(self, config: SumConfig, d_model: int, **place: Any) -> None:
        from seqlib.mixers import build_mixer

        super().__init__(config, d_model, **place)
        self.mixers = nn.ModuleList(build_mixer(m, d_model, **place) for m in config.mixers)
        self.gate = Linear(d_model, len(config.mixers)) if config.gate else None
        self.supports = frozenset.intersection(*(m.supports for m in self._each()))  # type: ignore[misc]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for mixer in self._each():
            mixer.reset_parameters()
        if self.gate is not None:
            fill_(self.gate.weight, 0.0)
            fill_(self.gate.bias, 0.0)

    def param_groups(self) -> list[tuple[list[str], dict[str, Any]]]:
        return [
            ([f"mixers.{i}.{name}" for name in names], options)
            for i, mixer in enumerate(self._each())
            for names, options in mixer.param_groups()
        ]

    def forward(
        self, x: Tensor, state: SumState | None = None, seq: SequenceInfo | None = None
    ) -> tuple[Tensor, SumState]:
        self.check(x, seq)
        states = (None,) * len(self.mixers) if state is None else state.states
        inputs = zip(self._each(), self._inputs(x), states, strict=True)
        ys, after = zip(*(mixer(part, before, seq) for mixer, part, before in inputs))
        return self._add(ys, x), SumState(after)

    def step(self, x: Tensor, state: SumState) -> tuple[Tensor, SumState]:
        inputs = zip(self._each(), self._inputs(x), state.states, strict=True)
        ys, after = zip(*(mixer.step(part, before) for mixer, part, before in inputs))
        return self._add(ys, x), SumState(after)

    def initial_state(
        self,
        batch: int,
        max_seqlen: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> SumState:
        return SumState(tuple(m.initial_state(batch, max_seqlen, device, dtype) for m in self._each()))

    def state_bytes(self, batch: int, seqlen: int) -> int:
        return sum(m.state_bytes(batch, seqlen) for m in self._each())

    def _each(self) -> list[Mixer]:
        return list(self.mixers)  # type: ignore[arg-type]

    def _inputs(self, x: Tensor) -> list[Tensor]:
        scales = self.config.in_scales or (1.0,) * len(self.mixers)
        return [x if scale == 1 else x * scale for scale in scales]

    def _add(self, ys: tuple[Tensor, ...], x: Tensor) -> Tensor:
        if self.config.out_scales is not None:
            ys = tuple(y * scale for y, scale in zip(ys, self.config.out_scales))
        if self.gate is None:
            return torch.stack(ys).sum(0)
        weights = torch.sigmoid(self.gate(x)).unsqueeze(-1).unbind(-2)
        return torch.stack([w * y for w, y in zip(weights, ys)]).sum(0)
