"""Input sets of attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlib.ops.attention.state import KVState
from seqlib.ops.case import Case, at_ends
from seqlib.sequence import SequenceInfo

__all__ = ["CASES", "from_letters"]


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
    """`lengths`: tokens that each row's state has seen; its capacity is the window, or else `capacity`."""

    def build(g: torch.Generator) -> dict[str, Any]:
        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        heads_kv, width = nheads_kv or nheads, headdim_v or headdim
        made: dict[str, Any] = {
            "q": draw(batch, seqlen, nheads, headdim),
            "k": draw(batch, seqlen, heads_kv, headdim),
            "v": draw(batch, seqlen, heads_kv, width),
        }
        if decays:
            made["log_decay"] = F.logsigmoid(draw(batch, seqlen, nheads))
        if ends:
            made["log_decay"] = at_ends(made["log_decay"])
        if lengths is not None:
            slots = options.get("window") or capacity
            made["state"] = KVState(
                draw(batch, slots, heads_kv, headdim),
                draw(batch, slots, heads_kv, width),
                torch.tensor(lengths),
                -draw(batch, slots, nheads).abs() if decays else None,
            )
        return made | options

    return build


def from_letters(*rows: str) -> SequenceInfo:
    """One letter per token: a new document where the letter changes, "." is padding, "<" goes on from the state."""
    numbers = torch.tensor([[-1 if c == "." else ord(c) for c in row] for row in rows])
    seq = SequenceInfo.from_seq_ids(numbers)
    assert seq.starts is not None
    return SequenceInfo(seq.starts & (numbers != ord("<")), seq.padding_mask)


def _pad(seqlen: int, *rows: tuple[int, int]) -> SequenceInfo:
    """Padding on the left and on the right of each row."""
    i = torch.arange(seqlen)
    return SequenceInfo(padding_mask=torch.stack([(i >= left) & (i < seqlen - right) for left, right in rows]))


_PACKED = from_letters("aaaaabbbcccccccddddddddde", "abbbbbbbbbbbbbbbbbbbbbbbb")
_MIXED = from_letters("..aaaabbb..ccc...", "aaaaaaaaaaaaaaaaa", ".................", "a...............b")
_CONTINUED = from_letters("<<<<<<aaabbbb", "..<<..<<a....", "aaaaaabbbbbbb", "<<<<<<<<<<<<<", ".............")


def _bench(name: str, window: int | None) -> Case:
    batch, seqlen, nheads, headdim = 1, 2048, 8, 64
    pairs = seqlen * (seqlen + 1) / 2 if window is None else seqlen * window - window * (window - 1) / 2
    return Case(
        name,
        _build(batch, seqlen, nheads, headdim, window=window),
        bench=True,
        flops=4.0 * batch * nheads * headdim * pairs,
        nbytes=16.0 * batch * seqlen * nheads * headdim,
    )


_KEEP = frozenset({"log_decay"})
CASES = (
    Case("one_token", _build(2, 1, 4, 8)),
    Case("two_tokens", _build(1, 2, 2, 16, nheads_kv=1)),
    Case("plain", _build(2, 63, 4, 16)),
    Case("grouped", _build(1, 65, 4, 20, nheads_kv=2)),
    Case("wider_values", _build(1, 33, 4, 8, nheads_kv=2, headdim_v=20, scale=0.5)),
    Case("narrower_values", _build(1, 33, 2, 20, headdim_v=8)),
    Case("bidirectional", _build(2, 65, 2, 8, causal=False)),
    Case("bidirectional_window", _build(2, 65, 2, 8, causal=False, window=16)),
    Case("bidirectional_padded", _build(4, 17, 2, 8, causal=False, seq=_MIXED)),
    Case("bidirectional_padded_window", _build(4, 17, 2, 8, causal=False, window=3, seq=_MIXED)),
    Case("window_1", _build(2, 63, 2, 8, window=1)),
    Case("window_2", _build(1, 65, 4, 16, nheads_kv=1, window=2)),
    Case("window_16", _build(2, 65, 4, 20, nheads_kv=2, window=16)),
    Case("window_65", _build(1, 65, 2, 8, window=65)),
    Case("window_66", _build(1, 65, 2, 8, window=66)),
    Case("window_blocks", _build(1, 200, 2, 8, nheads_kv=1, window=16)),
    Case("padded", _build(3, 63, 4, 8, nheads_kv=2, seq=_pad(63, (40, 0), (0, 13), (0, 0)))),
    Case("padded_window", _build(3, 63, 4, 8, nheads_kv=2, window=16, seq=_pad(63, (40, 0), (0, 13), (0, 0)))),
    Case("packed", _build(2, 25, 2, 8, seq=_PACKED)),
    Case("packed_window", _build(2, 25, 2, 8, window=4, seq=_PACKED)),
    Case("mixed", _build(4, 17, 4, 8, nheads_kv=1, seq=_MIXED)),
    Case("mixed_window", _build(4, 17, 4, 8, nheads_kv=1, window=2, seq=_MIXED)),
    Case("state", _build(2, 9, 4, 16, nheads_kv=2, lengths=(12, 12), capacity=30)),
    Case("state_grows", _build(2, 9, 2, 8, lengths=(5, 3), capacity=6)),
    Case("state_uneven", _build(3, 9, 2, 8, headdim_v=12, lengths=(0, 7, 20), capacity=40)),
    Case("state_one_token", _build(3, 1, 4, 8, nheads_kv=2, lengths=(0, 7, 20), capacity=40)),
    Case("ring", _build(4, 9, 4, 16, nheads_kv=2, window=16, lengths=(0, 5, 16, 100))),
    Case("ring_full", _build(2, 75, 2, 8, window=16, lengths=(30, 41))),
    Case("ring_uneven", _build(3, 170, 2, 8, window=16, lengths=(0, 5, 33))),
    Case("ring_one_token", _build(3, 1, 2, 8, window=2, lengths=(0, 1, 5))),
    Case("ring_window_1", _build(2, 3, 2, 8, window=1, lengths=(0, 4))),
    Case("state_continued", _build(5, 13, 2, 8, lengths=(4, 9, 6, 0, 3), capacity=20, seq=_CONTINUED)),
    Case("ring_continued", _build(5, 13, 2, 8, window=4, lengths=(4, 9, 6, 0, 3), seq=_CONTINUED)),
    Case("forget_one_token", _build(2, 1, 4, 8, decays=True), keep=_KEEP),
    Case("forget", _build(2, 63, 4, 16, nheads_kv=2, decays=True), keep=_KEEP),
    Case("forget_long", _build(1, 300, 2, 8, decays=True), keep=_KEEP),
    Case("forget_window", _build(1, 200, 2, 8, nheads_kv=1, window=16, headdim_v=12, decays=True), keep=_KEEP),
    Case("forget_mixed", _build(4, 17, 4, 8, nheads_kv=1, decays=True, seq=_MIXED), keep=_KEEP),
    Case("forget_state_uneven", _build(3, 9, 2, 8, decays=True, lengths=(0, 7, 20), capacity=40), keep=_KEEP),
    Case("forget_ring", _build(3, 170, 2, 8, window=16, decays=True, lengths=(0, 5, 33)), keep=_KEEP),
    Case(
        "forget_state_continued",
        _build(5, 13, 2, 8, decays=True, lengths=(4, 9, 6, 0, 3), capacity=20, seq=_CONTINUED),
        keep=_KEEP,
    ),
    Case(
        "forget_ring_continued",
        _build(5, 13, 2, 8, window=4, decays=True, lengths=(4, 9, 6, 0, 3), seq=_CONTINUED),
        keep=_KEEP,
    ),
    Case("forget_ends", _build(2, 150, 2, 8, nheads_kv=1, decays=True, ends=True), keep=_KEEP),
    Case("forget_window_ends", _build(1, 200, 2, 8, window=16, decays=True, ends=True), keep=_KEEP),
    Case("forget_ring_ends", _build(3, 70, 2, 8, window=16, decays=True, ends=True, lengths=(0, 5, 33)), keep=_KEEP),
    Case("forget_state_ends", _build(3, 9, 2, 8, decays=True, ends=True, lengths=(0, 7, 20), capacity=40), keep=_KEEP),
    Case("forget_mixed_ends", _build(4, 17, 4, 8, decays=True, ends=True, seq=_MIXED), keep=_KEEP),
    Case("relu", _build(2, 70, 4, 8, nheads_kv=2, headdim_v=12, relu=True)),
    Case("relu_bidirectional_padded", _build(4, 17, 2, 8, causal=False, relu=True, seq=_MIXED)),
    Case("relu_window", _build(1, 200, 2, 8, window=16, relu=True)),
    Case("relu_state_continued", _build(5, 13, 2, 8, relu=True, lengths=(4, 9, 6, 0, 3), capacity=20, seq=_CONTINUED)),
    _bench("attention_1x2048x8x64", None),
    _bench("attention_1x2048x8x64_window256", 256),
)
