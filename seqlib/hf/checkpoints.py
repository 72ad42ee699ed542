"""Which checkpoint a run goes on from: the last one that is whole and of its model."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import TrainerState

from seqlib.errors import SeqlibError

__all__ = ["Checkpoint", "last_whole"]

_WEIGHTS, _STATE, _OPTIMIZER, _SCHEDULE = "model.safetensors", "trainer_state.json", "optimizer.pt", "scheduler.pt"
_ARCHIVES = (_OPTIMIZER, _SCHEDULE, "training_args.bin")
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
        self.state = self._read_state()
        _check_config(path / "config.json", model)
        _check_weights(path / _WEIGHTS, model)
        states = [p.name for p in path.glob("rng_state_*.pth")] or ["rng_state.pth"]  # one per process
        for name in (*_ARCHIVES, *states):
            _check_archive(path / name)
        self._check_optimizer(model)
        self.best = self.path
        if self.state.best_model_checkpoint is not None:  # by name, because a run folder may be moved
            self.best = path.parent / Path(self.state.best_model_checkpoint).name
            self.state.best_model_checkpoint = str(self.best) if self.best.is_dir() else None
            if needs_best and self.best != path:
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


def _check_archive(path: Path) -> None:
    """Raise unless every byte is as it was written; torch keeps a checksum of each part."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile) as error:
        raise SeqlibError(f"{path} is missing or damaged ({error})") from error
    if damaged is not None:
        raise SeqlibError(f"{path} is damaged (in {damaged})")


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, LookupError, ValueError, pickle.UnpicklingError) as error:
        raise SeqlibError(f"{path} is damaged ({str(error).splitlines()[0]})") from error
