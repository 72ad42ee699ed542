"""Loading that refuses weights which do not fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from seqlib.errors import CheckpointMismatch
from seqlib.hf.files import HUB_OPTIONS, WeightFiles, read_json
from seqlib.ops.fused import is_plain

__all__ = ["listed", "load_checked", "refuse_layers", "refuse_not_finite", "refuse_sizes"]


def load_checked(load: Callable[..., Any], source: Any, *args: Any, **kwargs: Any) -> Any:
    """`load(source, ...)`, then CheckpointMismatch unless the weights fit and are finite.

    With `source` None the weights are handed over as `state_dict=`; then what is missing is the caller's wish.
    """
    wants_info = kwargs.pop("output_loading_info", False)
    tolerant = kwargs.pop("ignore_mismatched_sizes", False)
    if source is not None and not tolerant:
        _look(source, kwargs)
    try:
        # Sizes are compared here, where all that is wrong can be named at once.
        model, info = load(source, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
    except SafetensorError as error:
        raise CheckpointMismatch(f"{source}: a weights file is damaged ({error}); copy or download it again") from error
    if source is not None and not tolerant:
        refuse_misfit(source, model, info)
    refuse_not_finite(source, model)
    return (model, info) if wants_info else model


def _look(source: Any, options: Mapping[str, Any]) -> None:
    """Refuse files that are damaged or do not belong to their config, before anything is built from them."""
    if options.get("variant") or options.get("gguf_file") or options.get("state_dict") is not None:
        return  # files of other names, or none
    hub = {name: options[name] for name in HUB_OPTIONS if name in options}
    config = options.get("config")
    values = read_json(source, "config.json", hub) if config is None else config.to_dict()
    if values is not None:
        given = {name: value for name, value in options.items() if name in values}
        refuse_sizes(source, values | given, WeightFiles(source, hub).shapes)


_LAYERS = ("n_layer", "num_hidden_layers", "n_layers", "num_blocks", "decoder_layers", "num_layers")
_FREE = ("window", "l_max", "seed", "layer", "depth", "chunk_size", "block", "block_size", "bucket")
"""Integers of mixers that say nothing about the size of a weight."""


def refuse_layers(source: object, values: Mapping[str, Any], shapes: Mapping[str, Any]) -> None:
    """Raise if a config, in whosever terms, has more layers than there are tensors in the files."""
    for name in _LAYERS:
        count = values.get(name)
        if isinstance(count, int) and count > len(shapes):
            raise CheckpointMismatch(
                f"{source}: the config says {name}={count:,}, the weights are {len(shapes):,} tensors; they do "
                "not belong together"
            )


def refuse_sizes(source: object, values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise if a config of ours, as plain values, describes weights that are larger than all in the files.

    That is seen before anything is built, which could take all memory.
    """
    refuse_layers(source, values, shapes)
    total = sum(math.prod(shape) for shape in shapes.values())
    sizes = ("d_model",) if values.get("embedding") == "number" else ("d_model", "vocab_size")  # ids are then no rows
    widths = {name: values.get(name) for name in sizes}
    for part in ("mixers", "mlp", "blocks", "aside"):
        widths |= _integers(part, values.get(part))
    d_model = widths["d_model"] if isinstance(widths["d_model"], int) else 1
    for name, width in widths.items():
        wide = name == "vocab_size" or name.rpartition(".")[2].startswith(("d_mlp", "expand"))
        if isinstance(width, (int, float)) and (width * d_model if wide else width) > total:
            raise CheckpointMismatch(
                f"{source}: the config says {name}={width:,} (d_model={d_model:,}), the weights are {total:,} numbers "
                "in all; they do not belong together"
            )


def _integers(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        found: dict[str, Any] = {}
        for key, inner in value.items():
            found |= {} if key in _FREE else _integers(f"{name}.{key}", inner)
        return found
    counts = isinstance(value, int) or name.rpartition(".")[2].startswith("expand")
    return {name: value} if counts and not isinstance(value, bool) else {}


_HEADS = ("lm_head", "score", "qa_outputs")


def refuse_misfit(source: Any, model: Any, info: dict[str, Any]) -> None:
    """Raise unless everything but a head is there and has its shape."""

    def of_backbone(names: Iterable[str]) -> list[str]:
        return sorted(name for name in names if name.split(".")[0] not in _HEADS)

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
    if not is_plain(weight):
        return True  # quantised while it was loaded; such classes know few operations
    low, high = torch.aminmax(weight.detach())  # both are NaN if one entry is
    return bool(torch.isfinite(low) & torch.isfinite(high))


def listed(names: list[str], limit: int = 8) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
