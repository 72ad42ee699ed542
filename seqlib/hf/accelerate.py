"""Our ops under transformers' own recurrent models, whose classes and weights stay what they are."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch

from seqlib.errors import UnsupportedInput
from seqlib.hf.stand_ins import FUNCTIONS, METHODS, few_rows

__all__ = ["FAMILIES", "Acceleration", "accelerate_transformers"]

FAMILIES = (
    "bamba",
    "falcon_h1",
    "falcon_mamba",
    "granitemoehybrid",
    "jamba",
    "kimi_linear",
    "lfm2",
    "mamba",
    "mamba2",
    "minimax",
    "nemotron_h",
    "olmo_hybrid",
    "qwen3_5",
    "qwen3_next",
    "recurrent_gemma",
    "xlstm",
    "zamba",
    "zamba2",
)
_ABSENT = {"xlstm": "its mLSTM has no counterpart among our ops"}


@dataclass
class Acceleration:
    """What `accelerate_transformers` did. As a context manager it undoes that at the end of the block."""

    replaced: dict[str, str] = field(default_factory=dict)
    """By place, which of our functions runs there."""
    kept: dict[str, str] = field(default_factory=dict)
    """By place, why it was left alone."""
    _originals: list[tuple[Any, str, Any]] = field(default_factory=list)

    def undo(self) -> None:
        """Put everything back; a second call does nothing."""
        while self._originals:
            owner, name, original = self._originals.pop()
            setattr(owner, name, original)
        if _active and _active[-1] is self:
            _active.pop()

    def _put(self, owner: Any, name: str, make: Any, place: str) -> None:
        original = getattr(owner, name)
        self._originals.append((owner, name, original))
        setattr(owner, name, make(original))
        self.replaced[place] = f"{make.__module__}:{make.__name__}"

    def __str__(self) -> str:
        families: dict[str, list[str]] = {}
        for place in self.replaced:
            family, _, function = place.partition(".")
            families.setdefault(family, []).append(function)
        rows = [(family, ", ".join(functions)) for family, functions in families.items()]
        rows += [(place, f"as it was: {reason}") for place, reason in self.kept.items()]
        width = max(len(place) for place, _ in rows)
        return "\n".join(f"{place:<{width}}  {note}" for place, note in sorted(rows))

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.undo()


_active: list[Acceleration] = []


def accelerate_transformers(
    families: Iterable[str] | None = None, *, linear: bool = True, verbose: bool = True
) -> Acceleration:
    """Run transformers' own Mamba, Mamba-2, Jamba, Qwen3-Next... on our ops, on the CPU.

    Their modules look functions up by name when they run, so models that exist already are served as well. Tensors on
    other devices go to the original functions.

    Args:
        families: names of transformers' model folders, of `FAMILIES`; None is all that this version has.
        linear: also let every `torch.nn.Linear` of the process take our product for a few rows while no gradients
            are recorded. It is half of the time of decoding.
        verbose: print what was replaced, and why not the rest.

    Returns:
        An `Acceleration`; its `undo()` puts the originals back.

    Raises:
        UnsupportedInput: an unknown family, or a call while an earlier one still stands.
    """
    if _active:
        raise UnsupportedInput("transformers is accelerated already; call undo() on what the first call returned")
    wanted = FAMILIES if families is None else tuple(families)
    unknown = sorted(set(wanted) - set(FAMILIES))
    if unknown:
        raise UnsupportedInput(f"no stand-ins for {', '.join(unknown)}; known families: {', '.join(FAMILIES)}")
    done = Acceleration()
    for family in wanted:
        name = f"transformers.models.{family}.modeling_{family}"
        if importlib.util.find_spec(f"transformers.models.{family}") is None:
            done.kept[family] = "this version of transformers does not have it"
            continue
        module = importlib.import_module(name)
        before = len(done.replaced)
        for function, make in FUNCTIONS.items():
            if hasattr(module, function):
                done._put(module, function, make, f"{family}.{function}")
        for method, make in METHODS.items():
            owner, _, attribute = method.partition(".")
            if hasattr(module, owner):
                done._put(getattr(module, owner), attribute, make, f"{family}.{method}")
        if len(done.replaced) == before:
            done.kept[family] = _ABSENT.get(family, "none of its functions is known here")
    if linear:
        done._put(torch.nn.Linear, "forward", few_rows, "torch.nn.Linear.forward")
    else:
        done.kept["torch.nn.Linear.forward"] = "linear=False was asked for"
    _active.append(done)
    if verbose:
        print(done)
    return done
