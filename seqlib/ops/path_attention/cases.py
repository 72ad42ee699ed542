"""Input sets of PaTH attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlib.ops.attention.cases import from_letters
from seqlib.ops.case import Case, at_ends
from seqlib.ops.path_attention.state import PathState

__all__ = ["CASES"]


def _build(
    batch: int,
    seqlen: int,
    nheads: int,
    headdim: int,
    *,
    nheads_kv: int | None = None,
    headdim_v: int | None = None,
    lengths: Sequence[int] | None = None,
    capacity: int = 0,
    decays: bool = False,
    ends: bool = False,
    **options: Any,
) -> Callable[[torch.Generator], dict[str, Any]]:
    """`lengths`: tokens that each row's state has seen."""

    def build(g: torch.Generator) -> dict[str, Any]:
        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        heads_kv, width = nheads_kv or nheads, headdim_v or headdim
        made: dict[str, Any] = {
            "q": draw(batch, seqlen, nheads, headdim),
            "k": draw(batch, seqlen, heads_kv, headdim),
            "v": draw(batch, seqlen, heads_kv, width),
            "w": F.normalize(draw(batch, seqlen, heads_kv, headdim), dim=-1),
            "beta": 2 * torch.sigmoid(2 * draw(batch, seqlen, heads_kv)),
        }
        if decays:
            made["log_decay"] = F.logsigmoid(draw(batch, seqlen, nheads))
        if ends:
            made["log_decay"] = at_ends(made["log_decay"])
        if lengths is not None:
            made["state"] = PathState(
                draw(batch, capacity, heads_kv, headdim),
                draw(batch, capacity, heads_kv, width),
                torch.tensor(lengths),
                -draw(batch, capacity, nheads).abs() if decays else None,
            )
        return made | options

    return build


_KEEP = frozenset({"w", "beta", "log_decay"})
_MIXED = from_letters("..aaaabbb..ccc...", "aaaaaaaaaaaaaaaaa", ".................", "a...............b")
_CONTINUED = from_letters("<<<<<<aaabbbb", "..<<..<<a....", "aaaaaabbbbbbb", "<<<<<<<<<<<<<", ".............")


def _case(name: str, *sizes: int, **options: Any) -> Case:
    return Case(name, _build(*sizes, **options), keep=_KEEP)


CASES = (
    _case("one_token", 2, 1, 4, 8),
    _case("one_block", 2, 33, 2, 8),
    _case("blocks", 1, 50, 2, 8, chunk_size=16),
    _case("grouped", 2, 37, 4, 6, nheads_kv=2, headdim_v=10, chunk_size=8, scale=0.4),
    _case("narrow_blocks", 1, 9, 2, 4, chunk_size=2),
    _case("forget", 1, 41, 4, 8, nheads_kv=2, chunk_size=16, decays=True),
    _case("mixed", 4, 17, 4, 8, nheads_kv=1, chunk_size=4, seq=_MIXED),
    _case("forget_mixed", 4, 17, 2, 8, chunk_size=4, decays=True, seq=_MIXED),
    _case("state", 2, 19, 4, 8, nheads_kv=2, chunk_size=8, lengths=(12, 12), capacity=40),
    _case("state_grows", 3, 9, 2, 8, lengths=(0, 7, 10), capacity=10),
    _case("forget_state", 3, 19, 2, 8, chunk_size=8, decays=True, lengths=(0, 7, 10), capacity=40),
    _case("state_continued", 5, 13, 2, 8, chunk_size=4, lengths=(4, 9, 6, 0, 3), capacity=20, seq=_CONTINUED),
    _case(
        "forget_state_continued", 5, 13, 4, 8, nheads_kv=2, decays=True, lengths=(4, 9, 6, 0, 3), capacity=20,
        seq=_CONTINUED,
    ),
    _case("forget_ends", 1, 41, 4, 8, nheads_kv=2, chunk_size=16, decays=True, ends=True),
    _case("forget_state_ends", 3, 19, 2, 8, chunk_size=8, decays=True, ends=True, lengths=(0, 7, 10), capacity=40),
    Case(
        "path_1x2048x8x64",
        _build(1, 2048, 8, 64),
        keep=_KEEP,
        bench=True,
        flops=4.0 * 8 * 64 * 2048 * 2049 / 2,
        nbytes=20.0 * 2048 * 8 * 64,
    ),
)  # fmt: skip
