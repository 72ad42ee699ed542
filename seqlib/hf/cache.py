"""The bridge between a backbone's states and the cache that `generate()` hands around."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from seqlib.errors import UnsupportedInput
from seqlib.hf.rollback import Record
from seqlib.sequence import StateList

__all__ = ["SeqlibCache"]


class SeqlibCache(DynamicCache):
    """Holds a `StateList` in the clothes of a transformers cache; `forward` replaces what it holds.

    It has no transformers layers: every state, key and value lives in `states`, whose layout is each mixer's own
    business. So one class serves recurrent, attention and hybrid stacks alike.

    A forward brings the cache that it is given up to date. To continue one prefix in many ways, give each continuation
    a `copy.deepcopy` (all states are copied; nothing is shared), or `batch_repeat_interleave` one copy into a batch.

    After `activate_past_recording()` the last tokens can be taken back with `crop(-n)`: all since the last crop, and of
    a longer prompt the last 64. That is what speculative decoding asks for.

    Args:
        max_seqlen: number of positions for which states that grow (full attention) are allocated at once; None lets
            them grow as they need.
    """

    def __init__(self, max_seqlen: int | None = None) -> None:
        super().__init__()
        self.max_seqlen = max_seqlen
        self.states: StateList | None = None
        self.record: Record | None = None
        """What can be taken back; None while nothing is recorded."""

    def __len__(self) -> int:
        return 0 if self.states is None else len(self.states)

    def __bool__(self) -> bool:
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> SeqlibCache:
        # torch refuses to copy tensors that are part of a graph; cloning them is what is meant.
        made = copy.copy(self)
        made.states = None if self.states is None else self.states.clone()
        made.record = copy.copy(self.record)  # what it holds is never written into
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
    def is_linear(self) -> list[bool]:
        # Whatever the layers are, this cache counts its positions: a prompt with a prefix in it is cut behind that.
        return [False] * max(1, len(self))

    @property
    def is_sliding(self) -> list[bool]:
        # Nor are positions missing from it: whatever a layer forgets, masks are made by its full length.
        return self.is_linear

    @property
    def is_dummy(self) -> list[bool]:
        return self.is_linear

    @property
    def is_croppable(self) -> bool:
        return True

    @property
    def is_initialized(self) -> bool:
        return self.states is not None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        if self.record is not None and self.record.broken:
            return len(self.record) + (0 if self.record.before is None else self.record.before.seqlen)
        return 0 if self.states is None else self.states.seqlen

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.states is not None

    def reset(self) -> None:
        self.states = None
        if self.record is not None:
            self.record = Record()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.states is not None:
            self.states = self.states.reorder(beam_idx)
        if self.record is not None:
            self.record = self.record.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(torch.arange(max(self.batch_size, 0)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        rows = torch.as_tensor(indices)
        self.reorder_cache(rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows)

    def activate_past_recording(self) -> None:
        """From now on remember what `crop` needs."""
        if self.record is None:
            self.record = Record(before=self.states)

    def is_recording_past(self, layer_idx: int = 0) -> bool:
        return self.record is not None

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens, given as minus their number; crop(0) settles that all so far will stay."""
        if tokens_to_remove > 0:
            raise UnsupportedInput(
                f"crop takes minus the number of tokens to remove, got {tokens_to_remove}; to keep the first n tokens "
                "pass n - cache.get_seq_length()"
            )
        if self.record is None:
            if tokens_to_remove:
                raise UnsupportedInput(
                    "a recurrent state cannot be cropped unless it was recorded: call cache.activate_past_recording() "
                    "before the tokens, or keep a copy.deepcopy of the cache from before them"
                )
        elif tokens_to_remove:
            self.record.take_back(-tokens_to_remove)
        elif not self.record.broken:
            self.record = Record(before=self.states)
