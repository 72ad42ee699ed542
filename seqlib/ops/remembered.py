"""Decoding asks the same of an op at every token: what was checked and chosen for a call is remembered."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from seqlib.dispatch import Op, preferred

__all__ = ["remembered"]

_known: dict[tuple[Hashable, ...], Callable[..., Any]] = {}


def remembered(
    op: Op,
    backend: str,
    tensors: Sequence[Tensor | None],
    choose: Callable[[], Callable[..., Any]],
    options: Hashable = None,
) -> Callable[..., Any]:
    """What `choose` returns, called once for each set of shapes, dtypes and devices of `tensors`, and of `options`.

    It may look at nothing else, and raises for what does not fit. For calls without gradients.
    """
    if torch.compiler.is_compiling():
        return choose()
    layout = [None if t is None else (t.shape, t.dtype, t.device) for t in tensors]
    key = (op.name, op.function, preferred(op.name, backend), options, *layout)
    run = _known.get(key)
    if run is None:
        if len(_known) > 4096:
            _known.clear()
        run = _known[key] = choose()
    return run
