"""Input sets of causal_conv1d."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from seqlib.ops.case import Case
from seqlib.sequence import SequenceInfo

__all__ = ["CASES"]


def _build(
    batch: int,
    seqlen: int,
    d: int,
    d_conv: int,
    *,
    bias: bool = True,
    silu: bool = True,
    state: bool = False,
    seq: SequenceInfo | None = None,
) -> Callable[[torch.Generator], dict[str, Any]]:
    def build(g: torch.Generator) -> dict[str, Any]:
        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        made: dict[str, Any] = {"x": draw(batch, seqlen, d), "weight": draw(d, d_conv) / d_conv**0.5}
        made["bias"] = draw(d) if bias else None
        made["activation"] = "silu" if silu else None
        made["initial_state"] = draw(batch, d_conv - 1, d) if state else None
        return made | {"seq": seq}

    return build


def _strided(g: torch.Generator) -> dict[str, Any]:
    """x is the middle third of a wider projection."""
    made = _build(2, 33, 3 * 48, 4)(g)
    made["x"] = made["x"][..., 48:96]
    made["weight"], made["bias"] = made["weight"][:48], made["bias"][:48]
    return made


def _padding(seqlen: int, left: Sequence[int], right: Sequence[int]) -> Tensor:
    at = torch.arange(seqlen)
    return torch.stack([(at >= a) & (at < seqlen - b) for a, b in zip(left, right)])


def _padded_packed() -> SequenceInfo:
    """Pads on both sides and inside, documents of which one starts right after a pad, and a row without any token."""
    starts, mask = torch.zeros(3, 12, dtype=torch.bool), torch.ones(3, 12, dtype=torch.bool)
    mask[0, :2], mask[0, 6], mask[0, 10:], mask[2] = False, False, False, False
    starts[0, [4, 7, 9]], starts[1, [0, 1, 8]] = True, True
    return SequenceInfo(starts=starts, padding_mask=mask)


_KEEP = frozenset({"weight", "bias"})
_LENGTHS = [1, 5, 1, 1, 2, 30]
CASES = (
    *(Case(f"width_{w}", _build(2, 100, 17, w, state=w > 1), _KEEP) for w in (1, 2, 3, 4, 5)),
    *(Case(f"seqlen_{n}", _build(2, n, 48, 4, state=n < 64), _KEEP) for n in (1, 2, 3, 64, 129)),
    Case("one_channel", _build(1, 7, 1, 4), _KEEP),
    Case("odd_channels", _build(1, 100, 70, 4, silu=False), _KEEP),
    Case("no_bias", _build(2, 9, 70, 4, bias=False, state=True), _KEEP),
    Case("strided", _strided, _KEEP),
    Case("packed", _build(1, 40, 70, 4, seq=SequenceInfo.packed(_LENGTHS)), _KEEP),
    Case(
        "packed_continues", _build(1, 40, 48, 4, state=True, seq=SequenceInfo.packed(_LENGTHS, continues=True)), _KEEP
    ),
    Case("packed_ends_short", _build(1, 12, 17, 4, state=True, seq=SequenceInfo.packed([10, 2])), _KEEP),
    Case("left_padded", _build(3, 20, 48, 4, seq=SequenceInfo(padding_mask=_padding(20, (0, 7, 19), (0,) * 3))), _KEEP),
    Case("right_padded", _build(2, 20, 17, 4, seq=SequenceInfo(padding_mask=_padding(20, (0, 0), (4, 18)))), _KEEP),
    Case(
        "padded_state",
        _build(3, 70, 48, 3, state=True, seq=SequenceInfo(padding_mask=_padding(70, (3, 0, 40), (0, 2, 30)))),
        _KEEP,
    ),
    Case("padded_packed", _build(3, 12, 17, 4, state=True, seq=_padded_packed()), _KEEP),
    Case(
        "conv_1x2048x1536x4",
        _build(1, 2048, 1536, 4),
        _KEEP,
        bench=True,
        flops=2048 * 1536 * (2.0 * 4 + 5),
        nbytes=2048 * 1536 * 8.0,
    ),
)
