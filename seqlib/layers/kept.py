"""Values derived from parameters, made again only when a parameter has changed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from seqlib.errors import UnsupportedInput

__all__ = ["Kept", "accumulating"]

T = TypeVar("T")


class Kept:
    """Remembers what was made from some tensors, one value per name, while no gradient is recorded.

    A value is made again when its key is another or a tensor holds other numbers, whoever wrote them: on the CPU the
    numbers are compared with a copy. Elsewhere that would wait for the device, so there a tensor counts as changed when
    torch has counted a write to it or it lies in other memory; only writes through `tensor.data` go unseen. Copies and
    pickles of the owner start empty.

    With gradients, values are made anew in every pass, and shared between passes inside `accumulating`.

    >>> weight, kept = torch.ones(2), Kept()
    >>> with torch.no_grad():
    ...     before = kept("sum", 0, [weight], weight.sum)
    ...     again = kept("sum", 0, [weight], weight.sum) is before
    ...     after = kept("sum", 0, [weight.fill_(3)], weight.sum)
    >>> float(before), again, float(after)
    (2.0, True, 6.0)
    """

    def __init__(self) -> None:
        self._values: dict[str, tuple[Hashable, list[_Seen], Any]] = {}
        self._shared: dict[tuple[str, Hashable], _Shared] | None = None

    def __call__(self, name: str, key: Hashable, sources: Sequence[Tensor], make: Callable[[], T]) -> T:
        if torch.compiler.is_compiling():
            return make()
        if torch.is_grad_enabled():
            return make() if self._shared is None else self._share(name, key, sources, make)
        known = self._values.get(name)
        if known is not None and known[0] == key and _unchanged(known[1], sources):
            return known[2]
        value = make()
        if all(t.device.type == "cpu" or not t.is_inference() for t in sources):  # inference tensors count no writes
            self._values[name] = (key, [_see(t) for t in sources], value)
        return value

    def _share(self, name: str, key: Hashable, sources: Sequence[Tensor], make: Callable[[], T]) -> T:
        assert self._shared is not None
        known = self._shared.get((name, key))
        if known is None:
            # A checkpoint around this pass would otherwise want to see it made again.
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
                value = make()
            if not isinstance(value, Tensor) or not value.requires_grad:
                return value
            known = _Shared([_see(t) for t in sources], value, value.detach().requires_grad_())
            self._shared[name, key] = known
        elif not _unchanged(known.sources, sources):
            raise UnsupportedInput("a parameter changed inside accumulating(); leave it before optimizer.step()")
        return known.leaf  # type: ignore[return-value]

    def begin(self) -> None:
        """Share values between passes until `end`."""
        if self._shared is not None:
            raise UnsupportedInput("accumulating() is already at work on this module")
        self._shared = {}

    def end(self) -> list[tuple[Tensor, Tensor]]:
        """What was shared and has a gradient, with that gradient."""
        shared, self._shared = self._shared or {}, None
        return [(s.value, s.leaf.grad) for s in shared.values() if s.leaf.grad is not None]

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return (Kept, ())


@contextlib.contextmanager
def accumulating(module: nn.Module) -> Iterator[None]:
    """Make the convolution kernels of `module` once for all the passes and backward passes of the block.

    Gradients of several passes add up at the kernel and go on to its parameters when the block ends, so `clip` and
    `optimizer.step()` come after it. On one process: gradients that arrive at the end meet no all-reduce.

        with accumulating(model):
            for batch in batches:
                loss(model, batch).backward()
        optimizer.step()

    Raises:
        UnsupportedInput: a parameter is changed inside the block.
    """
    keepers = [m for part in module.modules() for m in vars(part).values() if isinstance(m, Kept)]
    for kept in keepers:
        kept.begin()
    ended = False
    try:
        yield
        ended = True
    finally:
        pairs = [pair for kept in keepers for pair in kept.end()]
        if ended and pairs:
            torch.autograd.backward([value for value, _ in pairs], [grad for _, grad in pairs])


class _Shared(NamedTuple):
    sources: list[_Seen]
    value: Tensor
    leaf: Tensor


class _Seen(NamedTuple):
    """A tensor as it was: a copy on the CPU, elsewhere its memory, held lest the address come back, and its writes."""

    tensor: Tensor
    writes: int | None


def _see(t: Tensor) -> _Seen:
    return _Seen(t.detach().clone(), None) if t.device.type == "cpu" else _Seen(t.detach(), t._version)


def _unchanged(seen: Sequence[_Seen], now: Sequence[Tensor]) -> bool:
    return len(seen) == len(now) and all(_same(s, t) for s, t in zip(seen, now))


def _same(seen: _Seen, t: Tensor) -> bool:
    then = seen.tensor
    if then.dtype != t.dtype or then.device != t.device:
        return False
    if seen.writes is None:
        return torch.equal(then, t)
    return not t.is_inference() and seen.writes == t._version and then.data_ptr() == t.data_ptr()
