"""Input sets of selective_scan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from seqlib.ops.case import Case, at_ends
from seqlib.sequence import SequenceInfo

__all__ = ["CASES"]

ALL = "Dzbs"  # D, gate, dt_bias, softplus


def _build(
    batch: int,
    seqlen: int,
    d_inner: int,
    d_state: int,
    options: str = "",
    *,
    groups: int = 0,
    constant: str = "",
    shared: str = "",
    cplx: bool = False,
    state: bool = False,
    ends: bool = False,
    seq: SequenceInfo | None = None,
) -> Callable[[torch.Generator], dict[str, Any]]:
    """groups 0 is B and C without a group axis; `constant` names those of B and C that do not depend on the token,
    `shared` those without a group axis beside one that has groups."""

    def build(g: torch.Generator) -> dict[str, Any]:
        def draw(*s: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
            return torch.randn(*s, generator=g, dtype=dtype)

        def projection(name: str) -> torch.Tensor:
            grouped = [groups] if groups and name not in shared else []
            lead = (d_inner,) if name in constant else (batch, seqlen, *grouped)
            return draw(*lead, d_state, dtype=torch.complex128 if cplx else torch.float64) * d_state**-0.5

        shape = (batch, seqlen, d_inner)
        dt = torch.exp(-4.6 * torch.rand(shape, generator=g, dtype=torch.float64))  # 0.01 to 1
        A = -torch.rand(d_inner, d_state, generator=g, dtype=torch.float64) * 4 - 0.1
        if ends:
            A = at_ends(A)
        if cplx:
            A = torch.complex(A, 3 * draw(d_inner, d_state))
        made: dict[str, Any] = {"x": draw(*shape), "dt": dt, "A": A, "B": projection("B"), "C": projection("C")}
        if "D" in options:
            made["D"] = draw(d_inner)
        if "z" in options:
            made["z"] = draw(*shape)
        if "b" in options:
            made["dt_bias"] = 0.1 * draw(d_inner).abs()
        if "s" in options:
            made |= {"dt": dt + torch.log(-torch.expm1(-dt)), "dt_softplus": True}
        if state:
            made["initial_state"] = draw(batch, d_inner, d_state, dtype=torch.complex128 if cplx else torch.float64)
        return made | ({"seq": seq} if seq else {})

    return build


def _mask(*rows: str) -> torch.Tensor:
    return torch.tensor([[c == "x" for c in row] for row in rows])


_REAL = _mask("xxxxxxxxxxx...", ".....xxxxxxxxx", "..............", "x...xx.......x")
PACKED = SequenceInfo.packed([5, 1, 1, 40, 34])
CONTINUED = SequenceInfo.packed([5, 1, 34, 41], continues=True)
PADDED = SequenceInfo(padding_mask=_REAL)
MIXED = SequenceInfo(
    starts=_mask("x....x..x.....", "......x.......", "x...x.........", "..x..xx......x"), padding_mask=_REAL
)
_KEEP = frozenset({"A", "D", "dt_bias", "initial_state"})


def _case(name: str, *sizes: Any, **options: Any) -> Case:
    return Case(name, _build(*sizes, **options), _KEEP)


def _bench(name: str, batch: int, seqlen: int, d_inner: int, d_state: int) -> Case:
    channels = batch * seqlen * d_inner
    return Case(
        name,
        _build(batch, seqlen, d_inner, d_state, ALL),
        _KEEP,
        bench=True,
        # exp (9), decay and input (3), update (2), output (2) per state; softplus, skip and gate (45) per channel.
        flops=channels * (16.0 * d_state + 45.0),
        nbytes=4.0 * (4 * channels + 2 * batch * seqlen * d_state),
    )


CASES = (
    _case("plain", 2, 33, 20, 4),
    _case("all_options", 2, 65, 48, 16, ALL, state=True),
    _case("skip_only", 1, 20, 17, 3, "D"),
    _case("gate_only", 1, 20, 17, 3, "z"),
    _case("bias_without_softplus", 1, 20, 17, 3, "b"),
    _case("groups", 2, 40, 36, 5, ALL, groups=3, state=True),
    _case("group_per_channel", 1, 9, 6, 4, ALL, groups=6),
    _case("one_group", 1, 9, 6, 4, ALL, groups=1),
    _case("shared_B", 2, 20, 12, 4, ALL, groups=3, shared="B"),
    _case("shared_C", 2, 20, 12, 4, ALL, groups=3, shared="C", state=True),
    _case("one_position", 2, 1, 70, 16, ALL, state=True),
    _case("two_positions", 1, 2, 33, 17, ALL),
    _case("odd_63", 1, 63, 7, 1, ALL),
    _case("odd_100", 1, 100, 130, 5, ALL),
    _case("wide_state", 1, 37, 19, 70, ALL, state=True),
    _case("packed", 1, 81, 18, 16, ALL, seq=PACKED),
    _case("packed_ignores_state", 1, 81, 18, 4, ALL, seq=PACKED, state=True),
    _case("continued", 1, 81, 18, 5, ALL, seq=CONTINUED, state=True),
    _case("padded", 4, 14, 20, 4, ALL, seq=PADDED),
    _case("padded_state", 4, 14, 20, 4, ALL, seq=PADDED, state=True),
    _case("packed_padded_groups", 4, 14, 20, 4, ALL, seq=MIXED, state=True, groups=2),
    _case("constant_B", 2, 20, 12, 4, ALL, constant="B"),
    _case("constant_B_C", 4, 14, 12, 4, ALL, constant="BC", seq=MIXED, state=True),
    _case("complex", 2, 70, 12, 4, ALL, cplx=True, state=True),
    _case("ends", 2, 65, 18, 4, ALL, state=True, ends=True),
    _case("packed_ends", 1, 81, 18, 3, "D", seq=PACKED, ends=True),
    _case("complex_ends", 2, 70, 12, 4, ALL, cplx=True, state=True, ends=True),
    _bench("mamba_130m_1x2048x1536x16", 1, 2048, 1536, 16),
    _bench("small_1x512x256x16", 1, 512, 256, 16),
)
