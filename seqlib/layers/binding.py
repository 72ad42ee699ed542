"""What decoding finds out about a model once: which layers an op may stand for, and which row runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from contextvars import ContextVar
from itertools import chain
from operator import is_
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from seqlib.dispatch import mode
from seqlib.layers.linear import Linear
from seqlib.layers.norm import RMSNorm
from seqlib.layers.short_conv import ShortConv
from seqlib.ops.fused import is_plain

__all__ = ["Binding", "bound", "fusable", "has_hooks", "watched"]

T = TypeVar("T")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")


class Binding:
    """What was found out about a module tree, true until one of its parts or the mode of torch changes.

    Decoding asks the same of the same modules at every token: whether somebody wants to see their calls, whether an op
    may read their weights, which row of its table takes them. Inside `use`, `bound` and `fusable` remember the answers;
    `use` compares the tree with how it was in one flat pass and forgets everything after a change: a hook, a layer or a
    parameter that was replaced, another dtype or device, another backend in scope, autocast. Threads that run one model
    in different modes do not see each other's answers.
    """

    def __init__(self) -> None:
        self._known: _Known | None = None

    @contextlib.contextmanager
    def use(self, root: nn.Module, x: Tensor) -> Iterator[None]:
        """Remember inside the block, which runs `root` on x."""
        if not is_plain(x):
            yield
            return
        now, known = mode(x.device.type), self._known  # read once: another thread may put its own there
        if known is None or known.mode != now or not _unchanged(known.tree):
            known = self._known = _Known(now, _describe(root), {})
        token = _current.set(known.found)
        try:
            yield
        finally:
            _current.reset(token)

    def __reduce__(self) -> tuple[type[Binding], tuple[()]]:
        return (Binding, ())


class _Known(NamedTuple):
    mode: tuple[Any, ...]
    tree: tuple[Any, ...]
    found: dict[Hashable, Any]


_current: ContextVar[dict[Hashable, Any] | None] = ContextVar("seqlib_binding", default=None)


def _describe(root: nn.Module) -> tuple[Any, ...]:
    tree = list(root.modules())
    modules = [m.__dict__ for m in tree]
    hooks = [m[name] for m in modules for name in _HOOKS]
    hooks += [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]
    parts, slots = [m["_modules"] for m in modules], [m["_parameters"] for m in modules]
    parameters = list(chain.from_iterable(map(dict.values, slots)))
    return (
        tree,
        list(map(type, tree)),
        [h for h in hooks if not h],
        [h for h in hooks if h],
        modules,
        list(map(len, modules)),  # grows with a `forward` put on the instance
        parts,
        list(chain.from_iterable(map(dict.values, parts))),
        slots,
        parameters,
        [None if p is None else p.dtype for p in parameters],
    )


def _unchanged(known: tuple[Any, ...]) -> bool:
    tree, types, empty, hooked, attributes, sizes, parts, part_list, slots, parameters, dtypes = known
    if any(empty) or not all(hooked) or list(map(len, attributes)) != sizes or list(map(type, tree)) != types:
        return False
    now = list(chain.from_iterable(map(dict.values, parts)))
    if len(now) != len(part_list) or not all(map(is_, now, part_list)):
        return False
    now = list(chain.from_iterable(map(dict.values, slots)))
    if len(now) != len(parameters) or not all(map(is_, now, parameters)):
        return False
    return [None if p is None else p.dtype for p in now] == dtypes


def bound(key: Hashable, make: Callable[[], T], *tensors: Tensor | None) -> T:
    """What `make` returned for this key, which names the modules that it looks at, and tensors of these layouts."""
    if torch.compiler.is_compiling():
        return make()
    found = _current.get()
    if found is None:
        return make()
    key = (key, *[None if t is None else (t.shape, t.stride(), t.dtype) for t in tensors])
    try:
        return found[key]
    except KeyError:
        made = found[key] = make()
        return made


def fusable(*layers: nn.Module, on: Tensor | None = None) -> bool:
    """Whether an op may take the parameters of these layers in place of their calls.

    That is so for `Linear`, `ShortConv` and `RMSNorm` that nobody has replaced (an adapter, a quantised layer), whose
    parameters are plain tensors, and whose calls nobody watches. With `on`, the input of a decoding step, autocast and
    compilers count as somebody.
    """
    if on is not None and (torch.compiler.is_compiling() or torch.is_autocast_enabled(on.device.type)):
        return False
    return bound(("fusable", layers), lambda: all(map(_ours, layers)) and not watched(*layers))


def has_hooks(module: nn.Module) -> bool:
    """Hooks of any kind on this module, or a `forward` put on the instance (as accelerate does to move weights)."""
    own = module.__dict__
    return "forward" in own or any(own[name] for name in _HOOKS)


def watched(*modules: nn.Module) -> bool:
    """Whether one of these modules or a part of it has hooks, or every module has (torch's global ones)."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return True
    return any(has_hooks(part) for module in modules for part in module.modules())


def _ours(layer: nn.Module) -> bool:
    known = type(layer) in (Linear, ShortConv, RMSNorm)
    return known and all(p is None or is_plain(p) for p in layer._parameters.values())
