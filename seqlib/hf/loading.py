"""Loading that refuses weights which do not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from seqlib.errors import CheckpointMismatch

__all__ = ["listed", "load_checked", "refuse_not_finite"]


def load_checked(load: Callable[..., Any], source: Any, *args: Any, **kwargs: Any) -> Any:
    """`load(source, ...)`, then CheckpointMismatch unless the weights fit and are finite.

    With `source` None the weights are handed over as `state_dict=`; then what is missing is the caller's wish.
    """
    wants_info = kwargs.pop("output_loading_info", False)
    tolerant = kwargs.pop("ignore_mismatched_sizes", False)
    try:
        # Sizes are compared here, where all that is wrong can be named at once.
        model, info = load(source, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
    except SafetensorError as error:
        raise CheckpointMismatch(f"{source}: a weights file is damaged ({error}); copy or download it again") from error
    if source is not None and not tolerant:
        refuse_misfit(source, model, info)
    refuse_not_finite(source, model)
    return (model, info) if wants_info else model


def refuse_misfit(source: Any, model: Any, info: dict[str, Any]) -> None:
    """Raise unless everything but a head is there and has its shape."""

    def of_backbone(names: Iterable[str]) -> list[str]:
        return sorted(name for name in names if name.split(".")[0] not in ("lm_head", "score"))

    problems = {
        "missing": of_backbone(info["missing_keys"]),
        "not part of the model": of_backbone(info["unexpected_keys"]),
        "of another shape": sorted(f"{key} {tuple(a)} for {tuple(b)}" for key, a, b in info["mismatched_keys"]),
    }
    found = [f"{what}: {listed(names)}" for what, names in problems.items() if names]
    if found:
        raise CheckpointMismatch(
            f"{source} does not fit {type(model).__name__} and its config; {'; '.join(found)}. Load it with the config "
            "it was saved with, or pass ignore_mismatched_sizes=True to start those weights anew"
        )


def refuse_not_finite(source: Any, model: nn.Module) -> None:
    """Raise if a weight holds NaN or infinity."""
    names = [name for name, weight in model.named_parameters() if not _finite(weight)]
    if names:
        raise CheckpointMismatch(
            f"{source or 'state_dict'} holds NaN or infinity in {listed(names)}; use an earlier checkpoint"
        )


def _finite(weight: torch.Tensor) -> bool:
    if weight.device.type == "meta" or not weight.is_floating_point() or not weight.numel():
        return True
    low, high = torch.aminmax(weight.detach())  # both are NaN if one entry is
    return bool(torch.isfinite(low) & torch.isfinite(high))


def listed(names: list[str], limit: int = 8) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
