"""Taking tokens back: what speculative decoding asks of a cache whose states cannot be cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from seqlib.errors import UnsupportedInput
from seqlib.sequence import SequenceInfo, StateList

__all__ = ["Record", "Span", "join"]

# Tokens at the end of a prompt that can be taken back; those before them only cost memory to remember.
DEPTH = 64
# Tokens that are run again together with the next ones. More are run again once, for good, in a pass of their own.
TOGETHER = 16

Run = Callable[[Tensor, StateList | None, SequenceInfo | None], tuple[Tensor, StateList]]


@dataclass(frozen=True)
class Span:
    """Inputs of a backbone: x (batch, seqlen, d_model) with the documents and padding that belong to them."""

    x: Tensor
    seq: SequenceInfo | None = None

    def __len__(self) -> int:
        return self.x.shape[1]

    def cut(self, begin: int | None, end: int | None) -> Span:
        """The positions from `begin` to `end`, as in a slice."""
        part = slice(begin, end)
        if self.seq is None:
            return Span(self.x[:, part])
        starts, real = self.seq.starts, self.seq.padding_mask
        return Span(
            self.x[:, part],
            SequenceInfo(
                starts=None if starts is None else starts[:, part],
                padding_mask=None if real is None else real[:, part],
                group=self.seq.group,
            ),
        )

    def reorder(self, rows: Tensor) -> Span:
        """Rows `rows` of the batch."""
        seq = self.seq
        if seq is not None:
            starts, real = (None if t is None else t[rows] for t in (seq.starts, seq.padding_mask))
            seq = SequenceInfo(starts=starts, padding_mask=real, group=seq.group)
        return Span(self.x[rows], seq)


def join(a: Span | None, b: Span) -> Span:
    """One span after the other."""
    if a is None or not len(a):
        return b
    seq = None
    if a.seq is not None or b.seq is not None:
        infos = [span.seq or SequenceInfo() for span in (a, b)]
        shapes = [span.x.shape[:2] for span in (a, b)]
        starts, real = None, None
        if any(info.starts is not None for info in infos):
            made = [a.x.new_zeros(s, dtype=torch.bool) if i.starts is None else i.starts for i, s in zip(infos, shapes)]
            starts = torch.cat(made, 1)
        if any(info.padding_mask is not None for info in infos):
            made = [
                a.x.new_ones(s, dtype=torch.bool) if i.padding_mask is None else i.padding_mask
                for i, s in zip(infos, shapes)
            ]
            real = torch.cat(made, 1)
        seq = SequenceInfo(starts=starts, padding_mask=real, group=infos[1].group)
    return Span(torch.cat([a.x, b.x], 1), seq)


@dataclass
class Record:
    """A state and the tokens that came after it, so that the last of them can be taken back.

    Nothing is undone inside a state: taking tokens back forgets it, and those that stay run again from `before`,
    together with the next ones. So this serves every mixer, at the price of one more state and the inputs since.
    """

    before: StateList | None = None
    since: Span | None = None
    broken: bool = False
    """Tokens were taken back: the state after `since` is not known."""

    def __len__(self) -> int:
        return 0 if self.since is None else len(self.since)

    def reorder(self, rows: Tensor) -> Record:
        """Rows `rows` of the batch."""
        before = None if self.before is None else self.before.reorder(rows)
        return Record(before, None if self.since is None else self.since.reorder(rows), self.broken)

    def take_back(self, tokens: int) -> None:
        """Forget the last `tokens`."""
        if tokens > len(self) or self.since is None:
            raise UnsupportedInput(
                f"the cache can take back {len(self)} tokens, asked for {tokens}: it remembers those since the last "
                f"crop, of a prompt the last {DEPTH}. Keep a copy.deepcopy of the cache to go back further"
            )
        self.since, self.broken = self.since.cut(None, len(self) - tokens), True

    def forward(self, run: Run, state: StateList | None, new: Span, *, whole: bool) -> tuple[Tensor, StateList]:
        """Outputs of a new span and the state after it. `whole` asks for a single pass, however long the span."""
        if self.broken:
            state, self.broken = self.before, False
            if len(self) > TOGETHER and not whole and self.since is not None:
                state, self.since = run(self.since.x, state, self.since.seq)[1], None
            elif len(self):
                self.since = join(self.since, new)
                hidden, state = run(self.since.x, state, self.since.seq)
                return hidden[:, -len(new) :], state
        if not len(self):
            self.before = state
        if whole or len(new) <= DEPTH:
            self.since = join(self.since, new)
            return run(new.x, state, new.seq)
        head, self.since = new.cut(None, -DEPTH), new.cut(-DEPTH, None)
        first, self.before = run(head.x, state, head.seq)
        last, state = run(self.since.x, self.before, self.since.seq)
        return torch.cat([first, last], 1), state

    def note_step(self, state: StateList, new: Span) -> StateList:
        """The state that a step over `new` may write into."""
        if not len(self):
            self.before, state = state, state.clone()
        self.since = join(self.since, new)
        return state
