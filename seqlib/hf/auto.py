"""Published checkpoints, opened as models of ours whatever their layout, and written back."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import save_torch_state_dict
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig

from seqlib.errors import CheckpointMismatch, ConfigError, SeqlibError
from seqlib.hf import convert, heads, modeling, pair
from seqlib.hf.configuration import SeqlibConfig
from seqlib.hf.families import FAMILIES, recognise
from seqlib.hf.families.base import Family, Part
from seqlib.hf.files import HUB_OPTIONS, WeightFiles, read_json
from seqlib.hf.loading import refuse_layers, refuse_not_finite, refuse_sizes

__all__ = ["export", "from_pretrained"]


def from_pretrained(
    id_or_dir: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    match: str = "authors",
    ignore: Iterable[str] = (),
    **kwargs: Any,
) -> modeling.SeqlibPreTrainedModel:
    """Open a checkpoint by its name on the Hub or its folder.

    A checkpoint of ours opens as the class that it was saved as. Published layouts (docs/CHECKPOINTS.md) open as
    `SeqlibForCausalLM`: they are recognised by their config and converted tensor by tensor while they are read.
    Either all weights fit, or nothing is loaded. No code of a checkpoint is run and nothing is unpickled but tensors.

    Args:
        dtype: of the weights; None or "auto" is what the checkpoint says. Decays stay in float32.
        device_map: a device, a dict of devices by module, or "auto" and its kin, as in transformers.
        match: "authors" or "transformers", where the library's port computes something else than the authors' code.
        ignore: fields of a published config that are unknown here and, you know, change nothing.
        kwargs: revision, subfolder, cache_dir, token, local_files_only, force_download as in transformers; and fields
            of SeqlibConfig that shape no weights, such as use_cache.

    Raises:
        CheckpointMismatch: an unknown layout, config fields or weights that do not fit, files that cannot be read.
        ConfigError: a keyword that is none of the above.
    """
    if match not in ("authors", "transformers"):
        raise ConfigError(f"match must be 'authors' or 'transformers', got {match!r}")
    hub = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
    values = read_json(id_or_dir, "config.json", hub) or read_json(id_or_dir, "params.json", hub)
    if values is None:
        raise CheckpointMismatch(f"{id_or_dir} has neither config.json nor params.json")
    if values.get("model_type") == SeqlibConfig.model_type:
        options = {"dtype": dtype, "device_map": device_map, **hub, **kwargs}
        return _class_of(values).from_pretrained(
            id_or_dir, **{name: value for name, value in options.items() if value is not None}
        )
    files = WeightFiles(id_or_dir, hub)
    refuse_layers(id_or_dir, values, files.shapes)
    try:
        family, values = recognise(id_or_dir, values, ignore)
        if family.look is not None:
            values |= family.look(files.shapes)
        config = SeqlibConfig(**family.config(values, match))
        refuse_sizes(id_or_dir, config.to_dict(), files.shapes)
        correspondences = list(family.parts(values, config))
    except SeqlibError:
        raise
    except _BAD_VALUES as error:
        raise CheckpointMismatch(
            f"{id_or_dir}: the values of its config do not fit together ({type(error).__name__}: {error}); copy or "
            "download it again"
        ) from error
    for name, value in kwargs.items():
        if name not in _FREE:
            raise ConfigError(
                f"from_pretrained has no keyword {name!r} for a {family.name} checkpoint; allowed are "
                f"{', '.join((*HUB_OPTIONS, *_FREE))}"
            )
        setattr(config, name, value)
    wanted = _dtype(dtype, values, files)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=wanted)
    parts = _fit(id_or_dir, family, correspondences, model, files)
    narrow = sorted({_starred(n) for p in parts for n in p.theirs if files.dtype(n) == wanted})
    config.origin = {"layout": family.name, "config": values, "match": match, "narrow": narrow}
    places = _places(model, device_map)
    _materialise(model, places)
    convert.read(parts, _tensors(model), files.read)
    model.tie_weights()
    model.eval()
    refuse_not_finite(id_or_dir, model)
    generation = read_json(id_or_dir, "generation_config.json", hub)
    if generation is not None:
        model.generation_config = GenerationConfig.from_dict(generation)
    return _dispatch(model, places)


def export(model: nn.Module, layout: str, directory: str | Path, *, max_shard_size: str = "5GB") -> None:
    """Write a language model in a published layout: its config and its weights, bit for bit.

    Every tensor keeps its own dtype: beside weights in 16 bits, decays that are float32 here are float32 there, unless
    the file that they came from had 16 bits for them and these still hold their values. A dtype that the config names
    becomes that of the embedding.

    Args:
        model: a `SeqlibForCausalLM` that was opened from that layout, or whose shape the layout can express.
        layout: a name from docs/CHECKPOINTS.md.
        directory: made if it does not exist.

    Raises:
        CheckpointMismatch: an unknown layout, or one that has no place for this model.
    """
    if layout not in FAMILIES:
        raise CheckpointMismatch(f"unknown layout {layout!r}; known: {', '.join(FAMILIES)}")
    if not isinstance(model, modeling.SeqlibForCausalLM):
        raise CheckpointMismatch(f"export takes a SeqlibForCausalLM, got {type(model).__name__}")
    family, config = FAMILIES[layout], model.config
    values = _their_config(family, config)
    dtype = model.model.embed_tokens.weight.dtype
    values |= {name: str(dtype).removeprefix("torch.") for name in ("dtype", "torch_dtype") if name in values}
    parts, ours = list(family.parts(values, config)), _tensors(model)
    if config.tie_word_embeddings and not family.stores_tied_head:
        parts = [part for part in parts if part.ours != (convert.HEAD,)]
    else:
        ours[convert.HEAD] = model.lm_head.weight
    written = {name: tensor.to("cpu").clone() for name, tensor in convert.write(parts, ours)}
    _narrowed(written, (config.origin or {}).get("narrow", []), dtype)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / family.config_file).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    if family.weights_file is None:
        save_torch_state_dict(written, folder, max_shard_size=max_shard_size)
    elif family.weights_file.endswith(".bin"):
        torch.save(written, folder / family.weights_file)
    else:
        save_file(written, folder / family.weights_file, metadata={"format": "pt"})


# What a number, a name or a list in the place of another raises where a layout or transformers reads it.
_BAD_VALUES = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError, StrictDataclassError)
_FREE = ("use_cache", "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")
"""Fields of our config that a caller may set on a published checkpoint."""


def _class_of(values: Mapping[str, Any]) -> Any:
    """The class that a checkpoint of ours was saved as."""
    name = (values.get("architectures") or ["SeqlibForCausalLM"])[0]
    module = next((m for m in (modeling, heads, pair) if name in m.__all__), None)
    return AutoModel if module is None else getattr(module, name)


def _dtype(dtype: torch.dtype | str | None, values: Mapping[str, Any], files: WeightFiles) -> torch.dtype:
    if dtype in (None, "auto"):
        largest = max(files.shapes, key=lambda name: math.prod(files.shapes[name]))
        dtype = values.get("dtype") or values.get("torch_dtype") or files.dtype(largest)
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"dtype must be a floating-point type of torch, got {dtype!r}")
    return found


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of the model once, under its first name."""
    return dict(model.named_parameters())


def _fit(source: object, family: Family, parts: list[Part], model: Any, files: WeightFiles) -> list[Part]:
    """The correspondences that hold; unties the head where the file has one of its own."""
    tied = model.config.tie_word_embeddings
    head, embedding = (next(p for p in parts if p.ours == (name,)) for name in (convert.HEAD, convert.EMBEDDING))
    stored = [next((n for n in p.theirs[0].split("|") if n in files), None) for p in (head, embedding)]
    if tied and None not in stored and not torch.equal(*(files.read(cast(str, name)) for name in stored)):
        tied = model.config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
        model.tie_weights()
    shapes = dict(files.shapes)
    if tied:
        shapes.pop(stored[0] or "", None)
    return convert.fit(source, parts, _tensors(model), shapes, family.ignored)


def _their_config(family: Family, config: SeqlibConfig) -> dict[str, Any]:
    """A config in their terms that means ours."""
    origin = config.origin or {}
    values = origin.get("config") if origin.get("layout") == family.name else None
    if values is None:
        if family.write is None:
            raise CheckpointMismatch(
                f"layout {family.name!r} can only be written for models that were opened from it, not for "
                f"{origin.get('layout') or 'a model of our own'}"
            )
        values = family.write(config)
    read = SeqlibConfig(**family.config(values, origin.get("match", "authors")))
    ours, theirs = _network(config), _network(read)
    differ = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if differ:
        raise CheckpointMismatch(f"layout {family.name!r} cannot express this model's {', '.join(differ)}")
    return dict(values)


# Fields of mixers that say how weights start.
_START = {"backend", "dt_min", "dt_max", "dt_floor", "dt_scale", "dt_init", "A_min", "A_max", "conv_init", "init_std"}


def _network(config: SeqlibConfig) -> dict[str, Any]:
    """What of a config decides about logits, whatever its layers are called."""
    backbone = config.backbone
    found = {name: getattr(config, name) for name in ("vocab_size", "embed_scale", "logit_scale", "logit_softcap")}
    named = ("mixers", "layer_pattern", "mlp", "blocks", "tile")
    found |= {name: value for name, value in backbone.to_dict().items() if name not in named}
    for i, name in enumerate(backbone.layer_pattern):
        mixer = backbone.mixers[name].to_dict()
        found |= {f"layer {i}: {k}": v for k, v in mixer.items() if k not in _START}
        block = backbone.block(i)
        found |= {f"layer {i}: block {k}": v for k, v in block.to_dict().items()}
        if block.mlp is not None:
            width = {"d_mlp": block.mlp.width(config.d_model), "multiple_of": 1}
            found[f"layer {i}: block mlp"] = block.mlp.to_dict() | width
    return found


def _narrowed(written: dict[str, Tensor], kinds: Iterable[str], dtype: torch.dtype) -> None:
    """Put tensors of these kinds, one per layer, in the dtype of the model where that loses nothing in any layer."""
    for kind in kinds:
        members = {name: tensor.to(dtype) for name, tensor in written.items() if _starred(name) == kind}
        if all(torch.equal(tensor.to(written[name].dtype), written[name]) for name, tensor in members.items()):
            written.update(members)


def _starred(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


def _materialise(model: nn.Module, places: Mapping[str, torch.device]) -> None:
    """Give every parameter memory on its device."""
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        device = next(places[p] for p in _prefixes(name) if p in places)
        made = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=parameter.requires_grad)
        setattr(model.get_submodule(owner), leaf, made)
    model.tie_weights()  # type: ignore[operator]


def _prefixes(name: str) -> Iterable[str]:
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


def _places(model: nn.Module, device_map: Any) -> dict[str, torch.device]:
    """Devices by the name of a module, "" for the whole model."""
    if device_map is None:
        device_map = "cpu"
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        from accelerate import infer_auto_device_map
        from accelerate.utils import get_balanced_memory

        blocks = ["Block"]
        low_zero = device_map == "balanced_low_0"
        memory = None
        if device_map != "sequential":
            memory = get_balanced_memory(model, no_split_module_classes=blocks, low_zero=low_zero)
        device_map = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=blocks)
    if not isinstance(device_map, Mapping):
        device_map = {"": device_map}
    if "disk" in device_map.values():
        raise ConfigError(
            "device_map puts modules on disk, which is not supported; give smaller weights or more memory"
        )
    return {
        name: torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
        for name, place in device_map.items()
    }


def _dispatch(model: Any, places: Mapping[str, torch.device]) -> Any:
    """Hooks that move activations, where modules lie on several devices."""
    if len(set(places.values())) == 1:
        return model
    from accelerate import dispatch_model

    return dispatch_model(model, {name: str(device) for name, device in places.items()})
