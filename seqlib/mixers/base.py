"""The protocol of sequence mixers.

A mixer is projections around an op. Whoever writes one file with a `Config` and a `Mixer` and adds a row to `MIXERS`
gets training, decoding, caching, packing and padding, and is held to these laws (tests/test_mixers.py runs them all):

- split invariance: forward on a whole sequence equals forward on its parts with the state handed on;
- step equals forward, position by position;
- causality: a change at position t moves nothing before t;
- packed documents equal the same documents alone; padding on either side is as if absent;
- rows of a batch do not see each other; the state is float32 where it accumulates, and as large as declared;
- gradients agree with the float64 reference form of the ops.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from seqlib.dispatch import preferred
from seqlib.errors import ConfigError, UnsupportedInput
from seqlib.sequence import SequenceInfo, State

__all__ = ["Mixer", "MixerConfig", "positive", "unpadded", "wide", "wide_dtype", "within", "without_gradients"]


@dataclass(frozen=True, kw_only=True)
class MixerConfig:
    """Hyperparameters of a mixer; subclasses add theirs, typed and documented. `kind` is the key in `MIXERS`."""

    kind: str = ""
    backend: str = "auto"
    """Pins the backend of this mixer's main op; an argument or `use_backend` still wins."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, `kind` and what differs from the defaults; `mixer_config` reads it back."""
        changed = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default
        }
        return {"kind": self.kind} | changed


C = TypeVar("C", bound=MixerConfig)


def without_gradients(step: Callable[..., Any]) -> Callable[..., Any]:
    """A decoding step, which writes into its state, kept apart from autograd."""

    @functools.wraps(step)
    def checked(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return step(self, x, *args, **kwargs)
        if x.requires_grad:
            raise UnsupportedInput(
                "step writes into its state and records no gradients, and x requires them; call forward on one "
                "position, or step under torch.no_grad()"
            )
        with torch.no_grad():
            return step(self, x, *args, **kwargs)

    return checked


def _continues(run: Callable[..., Any]) -> Callable[..., Any]:
    """A pass or step that may go on from a state made under torch.inference_mode."""

    @functools.wraps(run)
    def checked(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        args = tuple([a.writable() if isinstance(a, State) else a for a in args])
        if isinstance(kwargs.get("state"), State):
            kwargs["state"] = kwargs["state"].writable()
        return run(self, x, *args, **kwargs)

    return checked


class Mixer(nn.Module, Generic[C]):
    """Base of all mixers: a causal map (batch, seqlen, d_model) -> the same, with a state.

    Args:
        config: the mixer's own Config.
        d_model: residual width.
        layer_index: position in the stack, from 0; some mixers set decays by depth.
        n_layer: depth of the stack.
        branches: residual branches per layer (2 with an MLP). Output projections are scaled by
            1/sqrt(n_layer * branches), as GPT-2 and state-spaces/mamba do.
    """

    Config: ClassVar[type[MixerConfig]]
    supports: ClassVar[frozenset[str]] = frozenset({"packed", "padded", "initial_state"})
    """Of {"packed", "padded", "bidirectional", "initial_state", "sequence_parallel"}."""
    takes_residual: ClassVar[bool] = False
    """`forward` and `step` also take `residual`, the stream that their result is added to, before its norm."""
    reads_input: ClassVar[bool] = True
    """The result depends on more of x than its shape; else no gradient reaches what stands before the mixer."""
    layer_type: ClassVar[str] = "linear_attention"
    """The Hugging Face name of this kind of layer: linear_attention, full_attention or sliding_attention."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in {"forward", "step", "added_step"} & vars(cls).keys():
            setattr(cls, name, _continues(getattr(cls, name)))
        if "step" in vars(cls):
            cls.step = without_gradients(cls.step)  # type: ignore[method-assign]

    def __init__(self, config: C, d_model: int, *, layer_index: int = 0, n_layer: int = 1, branches: int = 1) -> None:
        super().__init__()
        self.config = config
        self.d_model = d_model
        self.layer_index = layer_index
        self.residual_scale = (n_layer * branches) ** -0.5

    def reset_parameters(self) -> None:
        """Initialise every own parameter; loaded ones are left alone (see layers/init.py)."""
        raise NotImplementedError

    def forward(self, x: Tensor, state: Any = None, seq: SequenceInfo | None = None) -> tuple[Tensor, Any]:
        """x: (batch, seqlen, d_model), any seqlen >= 1. Returns y like x and a new state; `state` is left alone."""
        raise NotImplementedError

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """x: (batch, d_model). The same as `forward` on one position; may write into `state`.

        It records no gradients, and refuses an x that asks for them: `forward` takes one position, too.
        """
        raise NotImplementedError

    def added_step(self, x: Tensor, norm: nn.Module, state: Any) -> tuple[Tensor, Any]:
        """x + step(norm(x)): a whole residual branch, which takes some mixers no more kernels than `step`."""
        y, state = self.step(norm(x), state)
        return x + y, state

    def initial_state(
        self,
        batch: int,
        max_seqlen: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """The state before the first position. `max_seqlen` lets growing states be allocated once."""
        raise NotImplementedError

    def state_bytes(self, batch: int, seqlen: int) -> int:
        """Size of the state after `seqlen` positions, in the dtypes of this module's parameters."""
        raise NotImplementedError

    def param_groups(self) -> list[tuple[list[str], dict[str, Any]]]:
        """Parameters that want their own optimizer options, by name within this module.

        Weight decay is taken off all vectors (norms, biases) by the backbone already.
        """
        return []

    def backend(self, op_name: str) -> str:
        """The backend for an op of this mixer: the scope of `use_backend`, else the one its config pins."""
        return preferred(op_name, config=self.config.backend)

    def check(self, x: Tensor, seq: SequenceInfo | None) -> None:
        """Raise UnsupportedInput unless x fits and every feature of seq is supported."""
        if x.dim() != 3 or x.shape[-1] != self.d_model or 0 in x.shape:
            raise UnsupportedInput(
                f"{self.config.kind} takes x of shape (batch >= 1, seqlen >= 1, {self.d_model}), got {tuple(x.shape)}"
            )
        if seq is not None:
            seq.check(x.shape[0], x.shape[1])
            asked = {"packed": seq.starts is not None, "padded": seq.padding_mask is not None}
            missing = [name for name, used in asked.items() if used and name not in self.supports]
            if missing:
                raise UnsupportedInput(
                    f"{self.config.kind} does not support {' and '.join(missing)} sequences; "
                    f"it supports: {', '.join(sorted(self.supports))}"
                )

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.config.to_dict().items())


def positive(config: MixerConfig, *names: str) -> None:
    """Raise ConfigError unless every named field is a positive integer or None."""
    for name in names:
        value = getattr(config, name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ConfigError(f"{config.kind}: {name} must be a positive integer, got {value!r}")


def within(config: MixerConfig, least: float, most: float, *names: str) -> None:
    """Raise ConfigError unless every named field is a number from `least` to `most`."""
    for name in names:
        value = getattr(config, name)
        if not least <= value <= most:
            raise ConfigError(f"{config.kind}: {name} must be a number from {least:,} to {most:,}, got {value!r}")


def unpadded(config: MixerConfig, seq: SequenceInfo | None) -> SequenceInfo | None:
    """`seq` with padding taken for tokens, as published code does that `lra_faithful` repeats."""
    if seq is not None and seq.starts is not None:
        raise UnsupportedInput(f"{config.kind} with lra_faithful=True knows no packed documents; pad them")
    return None


def wide_dtype(like: Tensor) -> torch.dtype:
    """The dtype of states and decays: float32, or float64 where the parameters are float64."""
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def wide_complex(like: Tensor) -> torch.dtype:
    """The same of complex states; torch's compiler cannot trace `dtype.to_complex`."""
    return torch.complex128 if like.dtype == torch.float64 else torch.complex64


def wide(tensor: Tensor) -> Tensor:
    """`tensor` in that dtype; decays lose their meaning in 16 bits."""
    return tensor.to(wide_dtype(tensor))
