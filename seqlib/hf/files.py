"""The files of a checkpoint, local or on the Hub: its config and its tensors, read one at a time."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from seqlib.errors import CheckpointMismatch

__all__ = ["HUB_OPTIONS", "WeightFiles", "read_json"]

HUB_OPTIONS = ("revision", "subfolder", "cache_dir", "token", "local_files_only", "force_download")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_WHOLE = ("model.safetensors", "pytorch_model.bin", "consolidated.safetensors")


def read_json(source: str | Path, name: str, hub: Mapping[str, Any]) -> dict[str, Any] | None:
    """A JSON file of the checkpoint, None if it has none of that name.

    Raises:
        CheckpointMismatch: it holds anything but a JSON object.
    """
    path = _find(source, name, hub)
    return None if path is None else _json_object(path)


def _json_object(path: str) -> dict[str, Any]:
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"), object_hook=_special)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        what = "is nested too deeply" if isinstance(error, RecursionError) else f"is not JSON ({error})"
        raise CheckpointMismatch(f"{path} {what}; copy or download it again") from error
    if not isinstance(found, dict):
        raise CheckpointMismatch(f"{path} must hold a JSON object, got {type(found).__name__}")
    return found


def _special(values: dict[str, Any]) -> Any:
    """transformers writes infinities as {"__float__": "Infinity"}."""
    if values.keys() != {"__float__"}:
        return values
    try:
        return float(values["__float__"])
    except (TypeError, ValueError):
        return values  # something else of that name, for its reader to refuse


class WeightFiles:
    """The tensors of a checkpoint by name; safetensors before old .bin files, whole or in shards.

    Nothing is unpickled but tensors: .bin files are read with torch's weights_only.

    Raises:
        CheckpointMismatch: no weights, or a file that is damaged or holds anything but tensors.
    """

    def __init__(self, source: str | Path, hub: Mapping[str, Any]) -> None:
        self.source, self._open, self._of = source, {}, {}  # type: ignore[var-annotated]
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name in _WHOLE:
            for wanted in (name, f"{name}.index.json"):
                path = _find(source, wanted, hub)
                if path is not None:
                    shards = [path] if wanted == name else self._shards(path, hub)
                    for shard in shards:
                        self._add(shard)
                    return
        raise CheckpointMismatch(f"{source} has no weights; looked for {', '.join(_WHOLE)} and their index files")

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        held = self._open[self._of[name]]
        return held[name] if isinstance(held, dict) else held.get_tensor(name)

    def dtype(self, name: str) -> torch.dtype:
        """Of one tensor, without reading it where the file says so."""
        held = self._open[self._of[name]]
        return held[name].dtype if isinstance(held, dict) else _DTYPES[held.get_slice(name).get_dtype()]

    def _shards(self, index: str, hub: Mapping[str, Any]) -> list[str]:
        places = _json_object(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise CheckpointMismatch(f"{index} must have a weight_map from names of tensors to names of files")
        names = sorted(set(places.values()))
        outside = [name for name in names if not name or Path(name).name != name or "\\" in name]
        if outside:
            raise CheckpointMismatch(f"{index} names {', '.join(outside)}, which is no file beside it; it is not read")
        paths = [(name, _find(self.source, name, hub)) for name in names]
        absent = [name for name, path in paths if path is None]
        if absent:
            raise CheckpointMismatch(f"{self.source}: the index names {', '.join(absent)}, which is not there")
        return [path for _, path in paths if path is not None]

    def _add(self, path: str) -> None:
        name = f"{self.source}: {Path(path).name}"
        try:
            if path.endswith(".safetensors"):
                held: Any = safe_open(path, framework="pt", device="cpu")
                shapes = {name: tuple(held.get_slice(name).get_shape()) for name in held.keys()}  # noqa: SIM118
            else:
                # Only the format of torch since 1.6 can be mapped into memory.
                held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
                if not isinstance(held, dict) or not all(isinstance(t, Tensor) for t in held.values()):
                    raise CheckpointMismatch(f"{name} must hold tensors by name, got {type(held).__name__}")
                shapes = {name: tuple(tensor.shape) for name, tensor in held.items()}
        except SafetensorError as error:
            raise CheckpointMismatch(f"{name} is damaged ({error}); copy or download it again") from error
        except pickle.UnpicklingError as error:
            raise CheckpointMismatch(
                f"{name} holds more than tensors, which could run code, and is not read; ask for a safetensors file"
            ) from error
        except (RuntimeError, EOFError, AttributeError) as error:
            raise CheckpointMismatch(
                f"{name} cannot be read as tensors ({error}); copy or download it again"
            ) from error
        self._open[path] = held
        self.shapes.update(shapes)
        self._of.update(dict.fromkeys(shapes, path))


def _find(source: str | Path, name: str, hub: Mapping[str, Any]) -> str | None:
    """Path of one file, downloaded where the source is no folder; None if the checkpoint has none of that name."""
    folder = Path(source)
    if folder.is_dir():
        path = folder / (hub.get("subfolder") or "") / name
        return str(path) if path.is_file() else None
    try:
        return hf_hub_download(str(source), name, **hub)
    except LocalEntryNotFoundError:
        if hub.get("local_files_only"):
            return None
        raise
    except EntryNotFoundError:
        return None
