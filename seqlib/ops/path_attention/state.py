"""The keys and values that PaTH attention carries from span to span."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from seqlib.ops.attention.state import KVState

__all__ = ["PathState"]


@dataclass
class PathState(KVState):
    """A `KVState` whose keys have come through the maps of all tokens after them.

    Keys are float32 (float64 for float64 values): in 16 bits they would drift as they are rewritten token by token.
    A key that a map with beta = 1 has passed over cannot be had back, so no token can be taken off again.
    """

    @classmethod
    def empty(
        cls,
        batch: int,
        capacity: int,
        nheads_kv: int,
        headdim: int,
        headdim_v: int | None = None,
        *,
        nheads_decay: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> PathState:
        """Room for `capacity` tokens and none in it; `dtype` is that of the values."""
        made = KVState.empty(
            batch, capacity, nheads_kv, headdim, headdim_v, nheads_decay=nheads_decay, dtype=dtype, device=device
        )
        wide = torch.promote_types(made.k.dtype, torch.float32)
        return cls(made.k.to(wide), made.v, made.length, made.log_decay)
