"""Values derived from parameters, made again only when a parameter has changed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["Kept"]

T = TypeVar("T")


class Kept:
    """Remembers what was made from some tensors, one value per name, while no gradient is recorded.

    A value is made again when its key is another, when a tensor was written to in place (torch counts those writes, as
    those of optimizers and `load_state_dict`) and when a tensor lies in other memory. The memory of the old tensors is
    held meanwhile, so that an address cannot come back with another content. Only writes through `tensor.data` go
    unseen. Copies and pickles of the owner start empty.

    >>> weight, kept = torch.ones(2), Kept()
    >>> with torch.no_grad():
    ...     before = kept("sum", 0, [weight], weight.sum)
    ...     again = kept("sum", 0, [weight], weight.sum) is before
    ...     after = kept("sum", 0, [weight.fill_(3)], weight.sum)
    >>> float(before), again, float(after)
    (2.0, True, 6.0)
    """

    def __init__(self) -> None:
        self._values: dict[str, tuple[Hashable, list[int], list[Tensor], Any]] = {}

    def __call__(self, name: str, key: Hashable, sources: Sequence[Tensor], make: Callable[[], T]) -> T:
        # Inference tensors count no writes.
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or any(t.is_inference() for t in sources):
            return make()
        versions = [t._version for t in sources]
        known = self._values.get(name)
        if known is not None:
            same_key, same_versions, held, value = known
            if same_key == key and same_versions == versions and _same_memory(held, sources):
                return value
        value = make()
        self._values[name] = (key, versions, [t.detach() for t in sources], value)
        return value

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return (Kept, ())


def _same_memory(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(s.data_ptr() == t.data_ptr() and s.dtype == t.dtype for s, t in zip(a, b))
