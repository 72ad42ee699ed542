"""What travels beside the tensors: where documents start, what is padding, and the states that layers carry.

One rule serves packing and padding everywhere: **a padded position is as if it were not there** (the state passes it
unchanged, its output is zero) and **a document start forgets everything before it**. Ops honour both or refuse.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlib.errors import UnsupportedInput

__all__ = ["SequenceInfo", "State", "StateList"]


@dataclass(frozen=True, eq=False)
class SequenceInfo:
    """Documents and padding of one batch, made once at the top of a model and handed down.

    Args:
        starts: (batch, seqlen) bool, True where a new document begins. A row whose first position is False continues
            the document that its initial state comes from. None: every row continues (or, without a state, is) one
            document. A document that begins at padding begins at the next real token of its row; where there is none,
            nothing begins in this span.
        padding_mask: (batch, seqlen) bool, True at real tokens, False at padding on either side. None: no padding.
        group: the process group that the sequence is split over, None for one process.
    """

    starts: Tensor | None = None
    padding_mask: Tensor | None = None
    group: Any = None

    def __post_init__(self) -> None:
        shapes = {
            name: tuple(t.shape)
            for name, t in (("starts", self.starts), ("padding_mask", self.padding_mask))
            if t is not None
        }
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            if len(shape) != 2 or tensor.dtype != torch.bool:
                raise UnsupportedInput(
                    f"{name} must be a bool tensor of shape (batch, seqlen), got {tensor.dtype} {shape}"
                )
        if len(shapes) > 1 and shapes["starts"] != shapes["padding_mask"]:
            raise UnsupportedInput(f"starts and padding_mask must have one shape, got {shapes}")
        if self.starts is not None and self.padding_mask is not None:
            object.__setattr__(self, "starts", _at_real_tokens(self.starts, self.padding_mask))

    @classmethod
    def packed(
        cls, lengths: Sequence[int], *, continues: bool = False, device: torch.device | str | None = None
    ) -> SequenceInfo:
        """One row of documents laid end to end. `continues`: the first one goes on from the initial state."""
        if not lengths or any(n < 1 for n in lengths):
            raise UnsupportedInput(f"document lengths must be positive, got {list(lengths)}")
        starts = torch.zeros(1, sum(lengths), dtype=torch.bool)
        starts[0, [0, *torch.tensor(lengths).cumsum(0)[:-1].tolist()]] = True
        starts[0, 0] = not continues
        return cls(starts=starts.to(device))

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, *, continues: bool = False) -> SequenceInfo:
        """The same from cumulative lengths (ndocs + 1,), first entry 0."""
        lengths = cu_seqlens.diff().tolist()
        if int(cu_seqlens[0]) != 0:
            raise UnsupportedInput(f"cu_seqlens must begin with 0, got {cu_seqlens.tolist()[:4]}...")
        return cls.packed(lengths, continues=continues, device=cu_seqlens.device)

    @classmethod
    def from_seq_ids(
        cls, seq_ids: Tensor, *, continues: bool = False, padding_mask: Tensor | None = None
    ) -> SequenceInfo:
        """From document numbers (batch, seqlen): a new document wherever a real token's number is not that of the real
        token before it. Negative numbers are padding, beside what `padding_mask` (True at real tokens) hides."""
        real = seq_ids >= 0
        real = real if padding_mask is None else real & padding_mask
        before = previous_real(real)
        starts = real & (seq_ids != seq_ids.gather(1, before.clamp(min=0)))
        starts = torch.where(before < 0, real & (not continues), starts)
        return cls(starts=starts, padding_mask=None if bool(real.all()) else real)

    @classmethod
    def from_padding(cls, mask: Tensor | None) -> SequenceInfo | None:
        """From an attention mask (batch, seqlen) of ones and zeros; None when it hides nothing."""
        if mask is None:
            return None
        mask = mask.bool()
        return None if bool(mask.all()) else cls(padding_mask=mask)

    @property
    def shape(self) -> tuple[int, int] | None:
        """(batch, seqlen) that this describes, None if it says nothing about positions."""
        known = self.starts if self.starts is not None else self.padding_mask
        return None if known is None else (known.shape[0], known.shape[1])

    def check(self, batch: int, seqlen: int) -> None:
        """Raise UnsupportedInput unless this describes a batch of that shape."""
        if self.shape not in (None, (batch, seqlen)):
            raise UnsupportedInput(f"seq describes (batch, seqlen) = {self.shape}, the inputs are {(batch, seqlen)}")

    @cached_property
    def document_ids(self) -> Tensor | None:
        """(batch, seqlen) int64 number of the document within the row; 0 continues the incoming state."""
        return None if self.starts is None else self.starts.long().cumsum(1)

    def positions(self, batch: int, seqlen: int, device: torch.device) -> Tensor:
        """(batch, seqlen) int64: how many real tokens of its own document stand before each token in this span."""
        real = torch.ones(batch, seqlen, dtype=torch.long, device=device)
        if self.padding_mask is not None:
            real = self.padding_mask.long()
        before = real.cumsum(1) - real
        if self.starts is None:
            return before
        return before - torch.where(self.starts, before, before.new_zeros(())).cummax(1).values

    @cached_property
    def spans(self) -> Tensor | None:
        """(nspans, 4) int32 on the CPU: row, begin, end, fresh, ordered by row and begin; None if nothing is special.

        The runs of real tokens that belong to one document. `fresh` is 1 where the state starts from zero and 0 where
        it goes on. Kernels walk this list, so they need no masks.
        """
        if self.shape is None:
            return None
        batch, seqlen = self.shape
        real = (
            self.padding_mask if self.padding_mask is not None else torch.ones(batch, seqlen, dtype=torch.bool)
        ).cpu()
        starts = (self.starts if self.starts is not None else torch.zeros(batch, seqlen, dtype=torch.bool)).cpu()
        before = F.pad(real, (1, 0))[:, :-1]
        after = F.pad(real & ~starts, (0, 1))[:, 1:]
        begins, ends = real & (starts | ~before), real & ~after
        rows, begin = begins.nonzero(as_tuple=True)
        end = ends.nonzero(as_tuple=True)[1] + 1
        return torch.stack([rows, begin, end, starts[rows, begin].long()], 1).int()

    @cached_property
    def links(self) -> Tensor | None:
        """(2, batch, seqlen + 1) int32 on the device of the masks, made without waiting for it; None as in `spans`.

        What GPU kernels read. [0]: for each token the real token before it in its row, -1 if there is none, -2 if it
        begins a document, -3 if it is padding; the last column stands after the row. [1]: the same from right to left:
        the real token after it, -1 if there is none, -2 if that one begins another document, -3 if it is padding.
        """
        if self.shape is None:
            return None
        known = self.starts if self.starts is not None else self.padding_mask
        assert known is not None
        real = torch.ones_like(known) if self.padding_mask is None else self.padding_mask
        starts = torch.zeros_like(known) if self.starts is None else self.starts
        end = real.shape[1]
        real, starts = F.pad(real, (0, 1), value=True), F.pad(starts, (0, 1))
        at = torch.arange(end + 1, device=known.device).expand_as(real)
        before = previous_real(real)
        after = F.pad(torch.where(real, at, end).flip(1).cummin(1).values.flip(1)[:, 1:], (0, 1), value=end)
        before = torch.where(starts, -2, before)
        after = torch.where(starts.gather(1, after), -2, torch.where(after == end, -1, after))
        return torch.where(real, torch.stack([before, after]), -3).int()

    def plan(self, device: torch.device) -> Tensor | None:
        """What the compiled kernels of a device read: `spans` on the CPU, `links` elsewhere."""
        return self.spans if device.type == "cpu" else self.links


def previous_real(real: Tensor) -> Tensor:
    """(batch, seqlen) int64: the last position before each one in its row that is real, -1 if there is none."""
    at = torch.arange(real.shape[1], device=real.device)
    return F.pad(torch.where(real, at, -1).cummax(1).values[:, :-1], (1, 0), value=-1)


def _at_real_tokens(starts: Tensor, real: Tensor) -> Tensor:
    """Starts at padding moved to the next real token of their row, so that no document merges with the one before."""
    begun = starts.long().cumsum(1)
    before = previous_real(real)
    known = torch.where(before < 0, 0, begun.gather(1, before.clamp(min=0)))
    return real & (begun > known)


S = TypeVar("S", bound="State")


@dataclass
class State:
    """What one mixer carries from span to span. Subclasses are dataclasses whose tensors have batch first.

    `Mixer.forward` returns a new state and leaves the given one alone; `Mixer.step` may write into the given one.
    """

    def map(self: S, fn: Callable[[Tensor], Tensor]) -> S:
        """The same state with `fn` applied to every tensor, nested states included."""

        def apply(value: Any) -> Any:
            if isinstance(value, Tensor):
                return fn(value)
            if isinstance(value, State):
                return value.map(fn)
            if isinstance(value, tuple):
                return tuple(apply(v) for v in value)
            return value

        return dataclasses.replace(self, **{f.name: apply(getattr(self, f.name)) for f in dataclasses.fields(self)})

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor of the state."""
        found: list[Tensor] = []

        def note(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        self.map(note)
        return iter(found)

    def reorder(self: S, index: Tensor) -> S:
        """Rows `index` of the batch (beam search, repetition, selection)."""
        return self.map(lambda t: t.index_select(0, index.to(t.device)))

    def to(self: S, device: torch.device | str) -> S:
        return self.map(lambda t: t.to(device))

    def detach(self: S) -> S:
        return self.map(Tensor.detach)

    def clone(self: S) -> S:
        return self.map(Tensor.clone)

    def writable(self: S) -> S:
        """This state, or a copy of one made under torch.inference_mode, which nothing outside it may write to or save
        for a backward pass."""
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return self
        return self.clone() if _of_inference(self.__dict__.values()) else self

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors())


def _of_inference(values: Iterable[Any]) -> bool:
    for value in values:
        if isinstance(value, Tensor):
            if value.is_inference():
                return True
        elif isinstance(value, State):
            if _of_inference(value.__dict__.values()):
                return True
        elif isinstance(value, tuple) and _of_inference(value):
            return True
    return False


@dataclass
class StateList:
    """The cache of a backbone: one state per layer and the number of positions seen, advanced by the backbone only."""

    states: list[State]
    seqlen: int = 0

    def writable(self) -> StateList:
        """These states, or copies of those made under torch.inference_mode (see `State.writable`)."""
        made = [state.writable() for state in self.states]
        return self if all(a is b for a, b in zip(made, self.states)) else self._each(made)

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, index: int) -> State:
        return self.states[index]

    def __iter__(self) -> Iterator[State]:
        return iter(self.states)

    def _each(self, states: Iterable[State]) -> StateList:
        return StateList(list(states), self.seqlen)

    def reorder(self, index: Tensor) -> StateList:
        return self._each(s.reorder(index) for s in self.states)

    def to(self, device: torch.device | str) -> StateList:
        return self._each(s.to(device) for s in self.states)

    def detach(self) -> StateList:
        return self._each(s.detach() for s in self.states)

    def clone(self) -> StateList:
        return self._each(s.clone() for s in self.states)

    @property
    def nbytes(self) -> int:
        return sum(s.nbytes for s in self.states)
