"""Input sets of kernelized attention with relative positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from seqlib.ops.attention.cases import from_letters
from seqlib.ops.case import Case
from seqlib.ops.rpe_attention.exponentials import fit_exponentials
from seqlib.ops.rpe_attention.state import ExponentialState, WindowState

__all__ = ["CASES"]


def _build(
    batch: int,
    seqlen: int,
    nheads: int,
    d_feature: int,
    window: int,
    *,
    headdim: int | None = None,
    causal: bool = True,
    lengths: Sequence[int] | None = None,
    fitted: int | None = None,
    spread: float = 1.0,
    **options: Any,
) -> Callable[[torch.Generator], dict[str, Any]]:
    """`lengths`: tokens that each row's window has seen; `fitted`: exponentials in place of the window."""

    def build(g: torch.Generator) -> dict[str, Any]:
        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        width = headdim or d_feature
        bias = spread * draw(nheads, window if causal else 2 * window - 1)
        made: dict[str, Any] = {
            "q": draw(batch, seqlen, nheads, d_feature).exp(),
            "k": draw(batch, seqlen, nheads, d_feature).exp(),
            "v": draw(batch, seqlen, nheads, width),
            "bias": bias,
            "causal": causal,
        }
        if fitted is not None:
            fall = torch.arange(window) * -torch.rand(nheads, 1, generator=g, dtype=torch.float64)
            made["bias"] = fall
            made["exponentials"] = fit = fit_exponentials(fall, fitted)
            if lengths is not None:
                sums = draw(batch, nheads, fit.rates.shape[1], d_feature, width + 1).abs()
                made["state"] = ExponentialState(sums.to(torch.complex128))
        elif lengths is not None:
            past = draw(batch, window, nheads, d_feature).exp(), draw(batch, window, nheads, width)
            made["state"] = WindowState(*past, torch.tensor(lengths))
        return made | options

    return build


_KEEP = frozenset({"bias"})
_MIXED = from_letters("..aaaabbb..ccc...", "aaaaaaaaaaaaaaaaa", ".................", "a...............b")
_CONTINUED = from_letters("<<<<<<aaabbbb", "..<<..<<a....", "aaaaaabbbbbbb", "<<<<<<<<<<<<<", ".............")
_SEEN = (4, 9, 6, 0, 3)


def _case(name: str, *sizes: int, **options: Any) -> Case:
    return Case(name, _build(*sizes, **options), keep=_KEEP)


CASES = (
    _case("one_token", 2, 1, 2, 4, 5),
    _case("short", 2, 17, 2, 4, 40, headdim=6),
    _case("window", 1, 150, 2, 5, 21, headdim=3),
    _case("blocks", 1, 300, 1, 4, 300),
    _case("wide_spread", 1, 60, 2, 4, 60, spread=2.0),
    _case("bidirectional", 2, 33, 2, 4, 33, causal=False),
    _case("bidirectional_window", 1, 150, 2, 4, 7, causal=False),
    _case("bidirectional_longer", 1, 20, 2, 4, 50, causal=False),
    _case("mixed", 4, 17, 2, 4, 6, seq=_MIXED),
    _case("bidirectional_mixed", 4, 17, 2, 4, 6, causal=False, seq=_MIXED),
    _case("ring", 3, 19, 2, 4, 8, lengths=(0, 5, 33)),
    _case("ring_continued", 5, 13, 2, 4, 4, lengths=_SEEN, seq=_CONTINUED),
    _case("fitted", 2, 19, 2, 4, 12, fitted=1),
    _case("fitted_state", 2, 19, 2, 4, 12, fitted=1, lengths=_SEEN),
    _case("fitted_continued", 5, 13, 2, 4, 12, fitted=1, lengths=_SEEN, seq=_CONTINUED),
    *(
        Case(
            f"rpe_1x{seqlen}x4x32",
            _build(1, seqlen, 4, 32, seqlen),
            keep=_KEEP,
            bench=True,
            flops=2.0 * 4 * 64 * seqlen * (seqlen + 1) / 2,
            nbytes=16.0 * seqlen * 4 * 32,
        )
        for seqlen in (2048, 16384)
    ),
)
