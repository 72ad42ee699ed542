"""Input sets of linear_scan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from seqlib.ops.case import Case, at_ends
from seqlib.sequence import SequenceInfo

__all__ = ["CASES"]

Build = Callable[[torch.Generator], dict[str, Any]]


def _build(
    *shape: int,
    decay: tuple[int, ...] | None = None,
    cplx: str = "",
    state: bool = False,
    seq: SequenceInfo | None = None,
    reverse: bool = False,
    ends: bool = False,
) -> Build:
    """`decay` is the shape of a, the shape of b by default; `cplx` names the complex tensors."""

    def build(g: torch.Generator) -> dict[str, Any]:
        def draw(name: str, *s: int) -> torch.Tensor:
            dtype = torch.complex128 if name in cplx else torch.float64
            return torch.randn(*s, generator=g, dtype=dtype)

        size = decay or shape
        a = torch.rand(size, generator=g, dtype=torch.float64) ** 0.25
        if ends:
            a = at_ends(a, (0.0, 1.0))
        if "a" in cplx:
            a = torch.polar(a, 6.28 * torch.rand(size, generator=g, dtype=torch.float64))
        made: dict[str, Any] = {"a": a, "b": draw("b", *shape)}
        if state:
            made["initial_state"] = draw("h", shape[0], *shape[2:])
        return made | ({"seq": seq} if seq else {}) | ({"reverse": True} if reverse else {})

    return build


def _mask(*rows: str) -> torch.Tensor:
    return torch.tensor([[c == "x" for c in row] for row in rows])


PACKED = SequenceInfo.packed([5, 1, 1, 40, 23])
CONTINUED = SequenceInfo.packed([5, 1, 34, 30], continues=True)
PADDED = SequenceInfo(padding_mask=_mask("xxxxxxxxxxx...", ".....xxxxxxxxx", "..............", "x...xx.......x"))
MIXED = SequenceInfo(
    starts=_mask("x....x..x.....", "......x.......", "x...x.........", "..x..xx......x"),
    padding_mask=_mask("xxxxxxxxxxx...", ".....xxxxxxxxx", "..............", "x...xx.......x"),
)
_KEEP = frozenset({"a", "initial_state"})


def _both(name: str, *shape: int, **options: Any) -> tuple[Case, Case]:
    return (
        Case(name, _build(*shape, **options), _KEEP),
        Case(f"{name}_reverse", _build(*shape, reverse=True, **options), _KEEP),
    )


CASES = (
    *_both("plain", 2, 65, 12, state=True),
    *_both("packed", 1, 70, 9, seq=PACKED),
    *_both("packed_state", 1, 70, 9, state=True, seq=PACKED),
    *_both("continued", 1, 70, 9, state=True, seq=CONTINUED),
    *_both("padded", 4, 14, 5, state=True, seq=PADDED),
    *_both("mixed", 4, 14, 5, state=True, seq=MIXED),
    *_both("complex", 2, 33, 7, cplx="abh", state=True),
    *_both("ends", 2, 65, 12, state=True, ends=True),
    *_both("packed_ends", 1, 70, 9, seq=PACKED, ends=True),
    *_both("complex_ends", 2, 33, 7, cplx="abh", state=True, ends=True),
    Case("constant_ends", _build(2, 40, 18, decay=(18,), state=True, ends=True), _KEEP),
    Case("complex_constant_a", _build(2, 40, 18, decay=(18,), cplx="abh", state=True), _KEEP),
    Case("complex_padded", _build(4, 14, 5, cplx="abh", seq=MIXED, state=True), _KEEP),
    Case("complex_a_real_b", _build(1, 17, 6, cplx="a"), _KEEP),
    Case("real_a_complex_b", _build(1, 20, 6, cplx="b"), _KEEP),
    Case("scalar_decay", _build(2, 64, 3, 10, decay=(2, 64, 3, 1)), _KEEP),
    Case("constant_decay", _build(2, 100, 3, 5, decay=(3, 5), state=True), _KEEP),
    Case("one_position", _build(3, 1, 17, state=True), _KEEP),
    Case("two_axes", _build(2, 63, 4, 6), _KEEP),
    Case("no_axes", _build(2, 50), _KEEP),
    Case(
        "linear_scan_1x4096x2048",
        _build(1, 4096, 2048),
        bench=True,
        flops=2.0 * 4096 * 2048,
        nbytes=12.0 * 4096 * 2048,
    ),
    Case(
        "complex_linear_scan_1x4096x1024",
        _build(1, 4096, 1024, cplx="ab"),
        bench=True,
        flops=8.0 * 4096 * 1024,
        nbytes=24.0 * 4096 * 1024,
    ),
)
