"""Input sets of long_conv."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from seqlib.ops.case import Case
from seqlib.sequence import SequenceInfo

__all__ = ["CASES"]


def _build(
    batch: int,
    seqlen: int,
    d: int,
    length: int,
    *,
    D: bool = True,
    reverse: int = 0,
    state: bool = False,
    seq: SequenceInfo | None = None,
    decay: float = 1.0,
) -> Callable[[torch.Generator], dict[str, Any]]:
    def build(g: torch.Generator) -> dict[str, Any]:
        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        def kernel(size: int) -> torch.Tensor:
            return draw(d, size) * (decay ** torch.arange(size)) / math.sqrt(min(size, seqlen + length))

        made: dict[str, Any] = {"x": draw(batch, seqlen, d), "kernel": kernel(length)}
        made["D"] = draw(d) if D else None
        made["reverse_kernel"] = kernel(reverse) if reverse else None
        made["initial_state"] = draw(batch, length - 1, d) if state else None
        return made | {"seq": seq}

    return build


def _strided(g: torch.Generator) -> dict[str, Any]:
    """x is the middle third of a wider projection."""
    made = _build(2, 33, 3 * 20, 33)(g)
    made["x"] = made["x"][..., 20:40]
    made["kernel"], made["D"] = made["kernel"][:20], made["D"][:20]
    return made


def _mask(*rows: str) -> torch.Tensor:
    return torch.tensor([[c == "x" for c in row] for row in rows])


_REAL = _mask("xxxxxxxxxxx...", ".....xxxxxxxxx", "..............", "x...xx.......x")
PACKED = SequenceInfo.packed([5, 1, 1, 40, 34])
CONTINUED = SequenceInfo.packed([5, 1, 34, 41], continues=True)
PADDED = SequenceInfo(padding_mask=_REAL)
MIXED = SequenceInfo(
    starts=_mask("x....x..x.....", "......x.......", "x...x.........", "..x..xx......x"), padding_mask=_REAL
)
_KEEP = frozenset({"kernel", "D", "reverse_kernel"})


def _case(name: str, *sizes: int, **options: Any) -> Case:
    return Case(name, _build(*sizes, **options), _KEEP)


def _bench(batch: int, seqlen: int, d: int, *, reverse: bool = False) -> Case:
    n = 2 * seqlen
    return Case(
        f"long_conv_{batch}x{seqlen}x{d}" + ("_both" if reverse else ""),
        _build(batch, seqlen, d, seqlen, reverse=seqlen - 1 if reverse else 0),
        _KEEP,
        bench=True,
        # Two real transforms per sequence and one per kernel at 2.5 n log2 n, and the products.
        flops=d * (2 * batch + 1) * 2.5 * n * math.log2(n) + 3.0 * batch * d * n,
        nbytes=4.0 * (2 * batch * seqlen * d + d * seqlen),
    )


CASES = (
    _case("plain", 2, 64, 20, 64),
    _case("no_skip", 1, 50, 17, 50, D=False),
    _case("one_position", 3, 1, 5, 1),
    _case("one_position_long_kernel", 2, 1, 5, 9),
    _case("one_position_state", 2, 1, 18, 9, state=True),
    _case("one_tap", 2, 9, 5, 1, state=True),
    _case("two_positions", 1, 2, 3, 2),
    _case("odd_batch", 3, 100, 33, 100),
    _case("prime", 2, 127, 16, 127, state=True),
    _case("short_kernel", 2, 300, 20, 7),
    _case("short_kernel_state", 2, 300, 20, 7, state=True),
    _case("long_kernel", 2, 20, 35, 200),
    _case("long_kernel_state", 2, 20, 35, 200, state=True),
    _case("past_1024", 1, 1025, 3, 1025),
    _case("both_ways", 2, 64, 20, 64, reverse=64),
    _case("both_ways_short", 3, 50, 17, 9, reverse=4),
    _case("both_ways_one_tap", 1, 50, 17, 1, reverse=1),
    _case("both_ways_long", 1, 21, 7, 40, reverse=90),
    _case("both_ways_one_position", 2, 1, 7, 1, reverse=3),
    Case("strided", _strided, _KEEP),
    _case("packed", 1, 81, 18, 81, seq=PACKED),
    _case("packed_ignores_state", 1, 81, 18, 30, seq=PACKED, state=True),
    _case("continued", 1, 81, 18, 30, seq=CONTINUED, state=True),
    _case("padded", 4, 14, 20, 14, seq=PADDED),
    _case("padded_state", 4, 14, 20, 6, seq=PADDED, state=True),
    _case("packed_padded", 4, 14, 20, 14, seq=MIXED, state=True),
    _case("packed_padded_both_ways", 4, 14, 20, 14, seq=MIXED, reverse=14),
    _bench(8, 2048, 256),
    _bench(8, 2048, 256, reverse=True),
    _bench(8, 512, 256),
    _bench(2, 8192, 256),
    _bench(1, 16384, 128),
)
