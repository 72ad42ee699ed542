"""Input sets of delta_rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from seqlib.ops.case import Case, at_ends
from seqlib.sequence import SequenceInfo

__all__ = ["CASES", "case"]


def _build(
    batch: int,
    seqlen: int,
    nheads: int,
    d_state: int,
    headdim: int,
    decay: str = "none",
    *,
    groups: tuple[int, int] | None = None,
    strong: float = 1.0,
    ends: bool = False,
    state: bool = False,
    seq: SequenceInfo | None = None,
    **options: Any,
) -> Callable[[torch.Generator], dict[str, Any]]:
    """decay: none | token | channel; `strong` multiplies it, `ends` puts 0 to
    -inf among it. groups: heads of q and of k. beta covers [0, 2]."""

    def build(g: torch.Generator) -> dict[str, Any]:
        def draw(*s: int) -> torch.Tensor:
            return torch.randn(*s, generator=g, dtype=torch.float64)

        def unit(t: torch.Tensor) -> torch.Tensor:
            return t / t.norm(dim=-1, keepdim=True)

        q_heads, k_heads = groups or (nheads, nheads)
        made: dict[str, Any] = {
            "q": unit(draw(batch, seqlen, q_heads, d_state)),
            "k": unit(draw(batch, seqlen, k_heads, d_state)),
            "v": draw(batch, seqlen, nheads, headdim),
            "beta": 2 * torch.rand(batch, seqlen, nheads, generator=g, dtype=torch.float64),
        }
        shapes = {"token": (batch, seqlen, nheads), "channel": (batch, seqlen, nheads, d_state)}
        if decay in shapes:
            # Log-uniform: memories of one to about a hundred tokens.
            made["log_decay"] = -strong * torch.exp(-4.6 * torch.rand(shapes[decay], generator=g, dtype=torch.float64))
        if ends:
            made["log_decay"] = at_ends(made["log_decay"])
        if state:
            made["initial_state"] = draw(batch, nheads, d_state, headdim)
        return made | ({"seq": seq} if seq else {}) | options

    return build


def _mask(*rows: str) -> torch.Tensor:
    return torch.tensor([[c == "x" for c in row] for row in rows])


_REAL = _mask("xxxxxxxxxxx...", ".....xxxxxxxxx", "..............", "x...xx.......x")
PACKED = SequenceInfo.packed([5, 1, 1, 40, 34, 80])
CONTINUED = SequenceInfo.packed([5, 1, 34, 121], continues=True)
PADDED = SequenceInfo(padding_mask=_REAL)
MIXED = SequenceInfo(
    starts=_mask("x....x..x.....", "......x.......", "x...x.........", "..x..xx......x"), padding_mask=_REAL
)
_KEEP = frozenset({"beta", "log_decay", "initial_state"})
_KINDS = ("none", "token", "channel")


def case(name: str, *sizes: Any, **options: Any) -> Case:
    return Case(name, _build(*sizes, **options), _KEEP)


def _bench(name: str, seqlen: int, nheads: int, d_state: int, headdim: int, decay: str) -> Case:
    tokens = seqlen * nheads
    return Case(
        name,
        _build(1, seqlen, nheads, d_state, headdim, decay),
        _KEEP,
        bench=True,
        # Decay, read for the error, write, read for the output.
        flops=tokens * (6.0 + (decay != "none")) * d_state * headdim,
        nbytes=4.0 * tokens * (2 * headdim + (3 if decay == "channel" else 2) * d_state),
    )


CASES = (
    *(case(f"{kind}_130", 2, 130, 3, 16, 20, kind, state=True) for kind in _KINDS),
    *(case(f"{kind}_one_position", 2, 1, 2, 5, 7, kind, state=True) for kind in _KINDS),
    *(case(f"{kind}_groups", 2, 65, 6, 16, 8, kind, groups=(2, 2), state=True) for kind in _KINDS),
    *(case(f"{kind}_packed", 1, 161, 2, 16, 9, kind, seq=PACKED, state=True) for kind in _KINDS),
    *(case(f"{kind}_continued", 1, 161, 2, 9, 16, kind, seq=CONTINUED, state=True) for kind in _KINDS),
    *(case(f"{kind}_padded", 4, 14, 2, 5, 6, kind, seq=PADDED) for kind in _KINDS),
    *(case(f"{kind}_mixed_groups", 4, 14, 4, 5, 6, kind, seq=MIXED, state=True, groups=(1, 2)) for kind in _KINDS),
    *(case(f"{kind}_strong", 1, 100, 2, 16, 16, kind, strong=30.0, state=True) for kind in _KINDS[1:]),
    *(case(f"token_tail_{n}", 4 if n == 2 else 1, n, 2, 16, 16, "token", scale=0.25) for n in (2, 3, 63, 64, 65, 100)),
    *(case(f"{kind}_wide", 1, 70, 1, 64, 64, kind, state=True) for kind in _KINDS),
    *(case(f"{kind}_odd_33", 1, 66, 2, 33, 33, kind, state=True) for kind in _KINDS),
    *(case(f"{kind}_ends", 2, 150, 5, 16, 9, kind, ends=True, state=True) for kind in _KINDS[1:]),
    *(case(f"{kind}_packed_ends", 1, 161, 9, 5, 6, kind, ends=True, seq=PACKED) for kind in _KINDS[1:]),
    case("token_wide_state", 1, 37, 1, 130, 20, "token"),
    case("token_wide_head", 1, 37, 1, 20, 150, "token", state=True),
    case("token_chunk_size", 1, 50, 2, 16, 16, "token", chunk_size=7, state=True),
    case("channel_chunk_size", 1, 50, 2, 16, 16, "channel", chunk_size=33),
    _bench("deltanet_1x2048x4x64", 2048, 4, 64, 64, "none"),
    _bench("gated_deltanet_1x2048x4x64", 2048, 4, 64, 64, "token"),
    _bench("kda_1x2048x4x64", 2048, 4, 64, 64, "channel"),
)
