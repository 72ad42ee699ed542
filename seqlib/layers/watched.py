"""Whether somebody wants to see the calls of a module, so that nothing may run in their place."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as torch_module

__all__ = ["has_hooks", "watched"]


def has_hooks(module: nn.Module) -> bool:
    """Hooks of any kind on this module, or a `forward` put on the instance (as accelerate does to move weights)."""
    d = module.__dict__
    return bool(
        d["_forward_pre_hooks"]
        or d["_forward_hooks"]
        or d["_backward_hooks"]
        or d["_backward_pre_hooks"]
        or "forward" in d
    )


def watched(module: nn.Module) -> bool:
    """Whether this module or a part of it has hooks, or every module has (torch's global ones)."""
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks) or _part_has_hooks(module)


def _part_has_hooks(module: nn.Module) -> bool:
    if has_hooks(module):
        return True
    for part in module.__dict__["_modules"].values():  # noqa: SIM110 - any() of a generator takes twice as long
        if part is not None and _part_has_hooks(part):
            return True
    return False
