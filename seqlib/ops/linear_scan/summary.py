"""The law of the linear recurrence: what a span does to the state, and how two spans do it one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from seqlib.ops.decays import decayed
from seqlib.ops.linear_scan.torch_impl import linear_scan
from seqlib.sequence import SequenceInfo

__all__ = ["combine", "summarize"]


def summarize(a: Tensor, b: Tensor, *, reverse: bool = False, seq: SequenceInfo | None = None) -> tuple[Tensor, Tensor]:
    """What a span does to an incoming state h:  h -> decay h + state.

    Differentiable. Sequence parallelism gathers these, and `combine` folds them.

    Args:
        a, b, reverse, seq: as in `linear_scan`.

    Returns:
        decay and state, both (batch, ...) in the dtype of the computation.

    Source: Blelloch 1990, section 1.4.
    """
    one = torch.ones_like(b[:, 0])
    _, decay = linear_scan(a, torch.zeros_like(b), initial_state=one, reverse=reverse, seq=seq)
    _, state = linear_scan(a, b, initial_state=None, reverse=reverse, seq=seq)
    return decay, state


def combine(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The summary of two spans, in the order of the scan. Associative; (1, 0) is its identity."""
    return decayed(second[0], first[0]), decayed(second[0], first[1]) + second[1]
