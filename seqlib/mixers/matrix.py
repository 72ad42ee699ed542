"""What mixers with a matrix state per head have in common: the state and its size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seqlib.errors import ConfigError, UnsupportedInput
from seqlib.layers.linear import stored
from seqlib.layers.short_conv import ShortConv
from seqlib.mixers.base import C, Mixer, wide_dtype
from seqlib.sequence import State

__all__ = ["MatrixMixer", "MatrixState", "divide"]


@dataclass
class MatrixState(State):
    """One matrix per head, and what the layers around it remember.

    state: (batch, nheads, d_state, headdim), float32 (float64 for float64 models), the last token included, undecayed.
    conv: (batch, d_conv - 1, channels), the last inputs of the short convolution, or None.
    length: (batch,) int64, real tokens of the current document, where positions matter; else None.
    decayed: whether the state is of the other convention, in which the last token has decayed once (the kernels of
        lightning-attention, LASP). Nothing but numbers would tell, so such a state is refused; see `undecayed`.
    """

    state: Tensor
    conv: Tensor | None = None
    length: Tensor | None = None
    decayed: bool = False

    def __post_init__(self) -> None:
        if self.decayed:
            raise UnsupportedInput(
                "a state whose last token has decayed already is of another convention and off by one decay per head; "
                "make it with MatrixState.undecayed(state, log_decay)"
            )

    @classmethod
    def undecayed(cls, state: Tensor, log_decay: Tensor) -> MatrixState:
        """From a decayed state (batch, nheads, d_state, headdim) and the constant log-decay of each head (nheads,)."""
        return cls(state * torch.exp(-log_decay)[:, None, None])


class MatrixMixer(Mixer[C]):
    """A mixer whose state is a `MatrixState` of `matrix_shape`, beside that of `conv1d` where it has one."""

    matrix_shape: tuple[int, int, int]
    """(nheads, d_state, headdim) of the state, set by the subclass."""
    conv1d: ShortConv
    """Its short convolution, where it has one."""
    counts: bool = False
    """Whether the state holds the number of tokens seen."""

    def initial_state(
        self,
        batch: int,
        max_seqlen: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> MatrixState:
        weight = stored(self, self)
        device = device or weight.device
        return MatrixState(
            torch.zeros(batch, *self.matrix_shape, dtype=wide_dtype(weight), device=device),
            self.conv1d.initial_state(batch, device, dtype) if hasattr(self, "conv1d") else None,
            torch.zeros(batch, dtype=torch.long, device=device) if self.counts else None,
        )

    def state_bytes(self, batch: int, seqlen: int) -> int:
        nheads, d_state, headdim = self.matrix_shape
        weight = stored(self, self)
        size = nheads * d_state * headdim * wide_dtype(weight).itemsize
        if hasattr(self, "conv1d"):
            channels, d_conv = self.conv1d.weight.shape
            size += channels * (d_conv - 1) * weight.element_size()
        return batch * (size + self.counts * torch.long.itemsize)


def divide(kind: str, whole: str, width: int, part: str, size: int) -> int:
    """width / size, refused unless it is whole and at least 1."""
    if width < 1:
        raise ConfigError(f"{kind}: {whole} must be at least 1, got {width}")
    if width % size:
        raise ConfigError(f"{kind}: {part} must divide {whole}={width}, got {size}")
    return width // size
