"""Mixers made of mixers: parallel heads, and one mixer at several depths."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from seqlib.errors import ConfigError
from seqlib.layers.init import fill_, linear_
from seqlib.layers.linear import Linear
from seqlib.mixers.base import Mixer, MixerConfig, positive
from seqlib.sequence import SequenceInfo, State

__all__ = ["Shared", "SharedConfig", "Sum", "SumConfig", "SumState", "share"]


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


@dataclass(frozen=True, kw_only=True)
class SharedConfig(MixerConfig):
    """Hyperparameters of `Shared`."""

    kind: str = "shared"
    mixer: MixerConfig | None = None
    """The mixer whose weights are shared, as a config or as plain values with a `kind`."""
    adapter_rank: int | None = None
    """Rank of the adapters that every depth has of its own; None for none."""
    adapted: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    """Which linear layers of the mixer they are added to."""

    def __post_init__(self) -> None:
        from seqlib.mixers import mixer_config

        positive(self, "adapter_rank")
        if self.mixer is None:
            raise ConfigError("shared: mixer must be the config of the mixer that is shared, got None")
        object.__setattr__(self, "mixer", mixer_config(self.mixer))
        object.__setattr__(self, "adapted", tuple(self.adapted))

    def to_dict(self) -> dict[str, Any]:
        assert self.mixer is not None
        made = super().to_dict() | {"mixer": self.mixer.to_dict()}
        return made | ({"adapted": list(self.adapted)} if "adapted" in made else {})


class Adapted(nn.Module):
    """A linear layer that is someone else's, plus up(down(x))."""

    def __init__(self, base: nn.Linear, adapter: nn.Sequential) -> None:
        super().__init__()
        self.base, self.adapter = base, adapter

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.adapter(x)


class Shared(Mixer[SharedConfig]):
    """One mixer's weights in several layers, each with a state, and with adapters, of its own.

        y = mixer(x),   with adapters W x + up_l(down_l(x)) in the place of W x

    All layers of one name in a `layer_pattern` share. The first owns the mixer, which is stored once, under its name;
    what a mixer makes of its depth (decays, initial scales) is as in that layer. Adapters start at zero. A stack that
    splits its layers over devices has to keep those that share on one.

    Source: Zamba (Glorioso et al. 2024, arXiv 2405.16712), section 2; adapters per depth: Zamba2 (arXiv 2411.15242),
    section 2, whose own blocks, which read the embeddings too, are `models.aside`.
    """

    Config: ClassVar[type[MixerConfig]] = SharedConfig
    # Whether there are keys and values to make room for is known only to the mixer.
    layer_type: ClassVar[str] = "full_attention"

    def __init__(self, config: SharedConfig, d_model: int, **place: Any) -> None:
        from seqlib.mixers import build_mixer

        super().__init__(config, d_model, **place)
        assert config.mixer is not None
        self.mixer: Mixer | None = build_mixer(config.mixer, d_model, **place)
        self.adapters = nn.ModuleDict()
        for name in config.adapted if config.adapter_rank else ():
            base = getattr(self.mixer, name, None)
            if not isinstance(base, nn.Linear):
                known = ", ".join(n for n, m in self.mixer.named_children() if isinstance(m, nn.Linear))
                raise ConfigError(f"shared: {config.mixer.kind} has no linear layer {name!r} to adapt; it has: {known}")
            assert config.adapter_rank is not None
            self.adapters[name] = nn.Sequential(
                Linear(base.in_features, config.adapter_rank, bias=False),
                Linear(config.adapter_rank, base.out_features, bias=False),
            )
        self._use(self.mixer)
        self.reset_parameters()

    def share(self, owner: Shared) -> None:
        """Give up the own mixer for that of `owner`."""
        if owner is not self:
            self.mixer = None
            self._use(owner._used[0])

    def _use(self, mixer: Mixer) -> None:
        view = mixer
        if self.adapters:
            # The same parameters and sub-modules, but for those that are adapted.
            view = copy.copy(mixer)
            changed = {name: Adapted(getattr(mixer, name), self.adapters[name]) for name in self.adapters}  # type: ignore[arg-type]
            view.__dict__["_modules"] = {**mixer._modules, **changed}
        # In a tuple, where they are not registered: each parameter is stored, trained and counted once.
        self._used = (mixer, view)
        self.supports = mixer.supports  # type: ignore[misc]

    def _current(self) -> Mixer:
        """The view, made anew where a layer of the mixer has been replaced, by an adapter or a quantised one."""
        mixer, view = self._used
        held = (m.base if isinstance(m, Adapted) else m for m in view._modules.values())
        if any(a is not b for a, b in zip(held, mixer._modules.values(), strict=True)):
            self._use(mixer)
        return self._used[1]

    def reset_parameters(self) -> None:
        if self.mixer is not None:
            self.mixer.reset_parameters()
        for adapter in self.adapters.children():
            down, up = adapter.children()
            assert isinstance(down, nn.Linear) and isinstance(up, nn.Linear)
            linear_(down)
            fill_(up.weight, 0.0)

    def param_groups(self) -> list[tuple[list[str], dict[str, Any]]]:
        owned = [] if self.mixer is None else self.mixer.param_groups()
        return [([f"mixer.{name}" for name in names], options) for names, options in owned]

    def forward(self, x: Tensor, state: Any = None, seq: SequenceInfo | None = None) -> tuple[Tensor, Any]:
        self.check(x, seq)
        return self._current()(x, state, seq)

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self._current().step(x, state)

    def initial_state(
        self,
        batch: int,
        max_seqlen: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        return self._used[0].initial_state(batch, max_seqlen, device, dtype)

    def state_bytes(self, batch: int, seqlen: int) -> int:
        return self._used[0].state_bytes(batch, seqlen)


def share(layers: Iterable[tuple[str, Mixer]]) -> None:
    """Let every `Shared` in layers of one name, inside other mixers too, use the mixer of the first."""
    owners: dict[tuple[str, str], Shared] = {}
    for name, mixer in layers:
        for path, part in list(mixer.named_modules()):
            if isinstance(part, Shared):
                part.share(owners.setdefault((name, path), part))
