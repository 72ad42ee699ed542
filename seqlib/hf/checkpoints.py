"""Which checkpoint a run goes on from: the last one that is whole, byte by byte, and of its model."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import TrainerState

from seqlib.errors import SeqlibError

__all__ = ["SUMS", "Checkpoint", "last_whole", "write_sums"]

SUMS = "SHA256SUMS"
"""Beside the files of a checkpoint; `sha256sum --check SHA256SUMS` reads it, too."""

_WEIGHTS, _STATE, _OPTIMIZER, _SCHEDULE = "model.safetensors", "trainer_state.json", "optimizer.pt", "scheduler.pt"
_MODEL = ("vocab_size", "d_model", "n_layer", "layer_pattern", "mixers", "mlp", "embedding", "pooling", "pair_head")


class Checkpoint:
    """A checkpoint whose files are whole and belong to the model.

    Args:
        path: its folder, named checkpoint-STEP.
        model: what it must hold the weights of.
        needs_best: the best checkpoint so far is needed too, because its weights are taken in the end.

    Raises:
        SeqlibError: a file is missing, damaged or of another model; says which.
    """

    def __init__(self, path: Path, model: nn.Module, needs_best: bool = True) -> None:
        self.path = path
        self.step = int(path.name.rpartition("-")[2])
        sums = _read_sums(path)
        for name in sums:
            _check_sum(path, name, sums)
        self.state = self._read_state()
        _check_config(path / "config.json", model)
        _check_weights(path / _WEIGHTS, model)
        self._check_optimizer(model)
        self.best = self.path
        if self.state.best_model_checkpoint is not None:  # by name, because a run folder may be moved
            self.best = path.parent / Path(self.state.best_model_checkpoint).name
            self.state.best_model_checkpoint = str(self.best) if self.best.is_dir() else None
            if needs_best and self.best != path:
                _check_sum(self.best, _WEIGHTS, _read_sums(self.best))
                _check_weights(self.best / _WEIGHTS, model)

    def _read_state(self) -> TrainerState:
        path = self.path / _STATE
        try:
            state = TrainerState.load_from_json(str(path))
        except (OSError, ValueError, TypeError) as error:
            raise SeqlibError(f"{path} is missing or damaged ({error})") from error
        if state.global_step != self.step:
            raise SeqlibError(f"{path} is of step {state.global_step}, not of step {self.step}")
        return state

    def _check_optimizer(self, model: nn.Module) -> None:
        path = self.path / _OPTIMIZER
        state = _load(path)
        wanted = Counter(p.shape for p in model.parameters() if p.requires_grad)
        try:
            count = sum(len(group["params"]) for group in state["param_groups"])
            found = Counter(part["exp_avg"].shape for part in state["state"].values())
        except (LookupError, TypeError, AttributeError) as error:
            raise SeqlibError(f"{path} is no state of AdamW ({error!r})") from error
        if count != sum(wanted.values()) or found - wanted:
            raise SeqlibError(f"{path} is of another model: its tensors have other shapes")
        path = self.path / _SCHEDULE
        schedule = _load(path)
        if not isinstance(schedule, dict) or schedule.get("last_epoch") != self.step:
            raise SeqlibError(f"{path} is not of step {self.step}")


def last_whole(
    folder: Path, model: nn.Module, say: Callable[[str], None], *, needs_best: bool = True
) -> Checkpoint | None:
    """The latest checkpoint in `folder` that can be gone on from; None where there is none.

    Args:
        needs_best: as for `Checkpoint`.
        say: told why a later one is passed over, and from where the run goes on.
    """
    paths = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    refused = False
    for path in sorted(paths, key=lambda p: int(p.name.rpartition("-")[2]), reverse=True):
        try:
            found = Checkpoint(path, model, needs_best)
        except SeqlibError as error:
            say(f"{path.name} is passed over: {error}")
            refused = True
            continue
        if refused:
            say(f"training goes on from {path.name}")
        return found
    if refused:
        say("no checkpoint is whole; training begins again")
    return None


def _check_config(path: Path, model: Any) -> None:
    try:
        found = json.loads(path.read_text("utf-8"))
        wanted = json.loads(model.config.to_json_string(use_diff=False))
        different = [key for key in _MODEL if found.get(key) != wanted.get(key)]
    except (OSError, ValueError, AttributeError) as error:
        raise SeqlibError(f"{path} is missing or damaged ({error})") from error
    if different:
        raise SeqlibError(f"{path} is of another model: it differs in {', '.join(different)}")


def _check_weights(path: Path, model: nn.Module) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    try:
        with safe_open(str(path), "pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise SeqlibError(f"{path} is missing or damaged ({error})") from error
    shared = set(getattr(model, "all_tied_weights_keys", None) or ())
    different = [name for name, shape in found.items() if wanted.get(name) != shape]
    different += [name for name in wanted.keys() - found.keys() if name not in shared]
    if different:
        raise SeqlibError(f"{path} is of another model: {different[0]} is missing, unknown or of another shape")


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS of every file in a checkpoint, which tells later whether all of them are as they were."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{_sum(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def _read_sums(folder: Path) -> dict[str, str]:
    """Sums by the names of their files."""
    path = folder / SUMS
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise SeqlibError(f"{path} is missing or damaged ({error})") from error
    found = {name: value for value, _, name in (line.partition("  ") for line in lines)}
    if not {_WEIGHTS, _STATE, _OPTIMIZER, _SCHEDULE} <= found.keys():
        raise SeqlibError(f"{path} is damaged: it does not name every file of a checkpoint")
    return found


def _check_sum(folder: Path, name: str, sums: Mapping[str, str]) -> None:
    path = folder / name
    try:
        found = _sum(path)
    except OSError as error:
        raise SeqlibError(f"{path} is missing or damaged ({error})") from error
    if found != sums[name]:
        raise SeqlibError(f"{path} is damaged: its SHA-256 is not the one in {SUMS}")


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, LookupError, ValueError, pickle.UnpicklingError) as error:
        raise SeqlibError(f"{path} is damaged ({str(error).splitlines()[0]})") from error
