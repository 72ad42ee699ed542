"""The bridge between a backbone's states and the cache that `generate()` hands around."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from seqlib.errors import UnsupportedInput
from seqlib.sequence import StateList

__all__ = ["SeqlibCache"]


class SeqlibCache(DynamicCache):
    """Holds a `StateList` in the clothes of a transformers cache; `forward` replaces what it holds.

    It has no transformers layers: every state, key and value lives in `states`, whose layout is each mixer's own
    business. So one class serves recurrent, attention and hybrid stacks alike.

    Args:
        max_seqlen: number of positions for which states that grow (full attention) are allocated at once; None lets
            them grow as they need.
    """

    def __init__(self, max_seqlen: int | None = None) -> None:
        super().__init__()
        self.max_seqlen = max_seqlen
        self.states: StateList | None = None

    def __len__(self) -> int:
        return 0 if self.states is None else len(self.states)

    def __bool__(self) -> bool:
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> SeqlibCache:
        # torch refuses to copy tensors that are part of a graph; cloning them is what is meant.
        made = copy.copy(self)
        made.states = None if self.states is None else self.states.clone()
        return made

    @property
    def batch_size(self) -> int:
        """Rows of the batch, -1 before the first forward."""
        first = None if self.states is None else next((t for state in self.states for t in state.tensors()), None)
        return -1 if first is None else first.shape[0]

    @property
    def is_compileable(self) -> bool:
        # generate() would wrap the decode step in torch.compile; the step is already a single pass over kernels.
        return False

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self.states is not None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.states is None else self.states.seqlen

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.states is not None

    def reset(self) -> None:
        self.states = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.states is not None:
            self.states = self.states.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.states is not None:
            self.states = self.states.reorder(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.states is not None:
            rows = torch.as_tensor(indices)
            self.states = self.states.reorder(rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise UnsupportedInput(
                "a recurrent state cannot be cropped; keep a copy.deepcopy of the cache from before the tokens, "
                "or run the shorter sequence again"
            )
