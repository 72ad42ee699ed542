"""Recipes: a task, a model and how it is trained, as one value that can be printed, changed and stored."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from seqlib.dispatch import BACKENDS
from seqlib.errors import ConfigError
from seqlib.hf.recipes import LAYERS, check_numbers, checked_mixer
from seqlib.mixers import MIXERS, looks_ahead

from .prepare import generator_options
from .protocols import PROTOCOLS
from .published import PUBLISHED
from .recall import RECALL, full_options
from .tasks import TASKS

__all__ = ["Recipe", "check_task", "find_recipe", "recipe_names"]

_GLU = {"gated": True}
_FIELD: Any = object()  # the value of the field itself
_SCHEDULES = ("cosine", "linear", "constant_with_warmup")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A task, a model and how it is trained."""

    name: str
    task: str
    """A task of Long Range Arena or of the synthetic suite."""
    protocol: str = "seqlib"
    """How data is cut and split (`lra.protocols`); without meaning for synthetic tasks."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Options of the generator, where data is generated."""
    d_model: int = 64
    n_layer: int = 2
    layer_pattern: str = "m"
    mixers: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"m": {"kind": "mamba"}})
    mlp: Mapping[str, Any] | None = None
    numbers: bool = False
    """Pixels as numbers through a linear map, as the S4 family reads them, instead of an embedding each."""
    batch_size: int = 32
    accumulation: int = 1
    steps: int = 1000
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    """"cosine" or "linear" down to 0 after the warm-up, or "constant_with_warmup"."""
    warmup_steps: int = 100
    weight_decay: float = 0.05
    beta2: float = 0.999
    clip: float = 1.0
    dtype: str = "float32"
    backend: str = "auto"
    seed: int = 0
    log_every: int = 20
    eval_every: int = 200
    """Steps between evaluations on held-out data, each with a checkpoint; a multiple of log_every."""
    eval_examples: int = 2000
    patience: int = 0
    """Evaluations without a better score before training stops; 0 never stops early."""
    enough: float = 1.0
    """Held-out accuracy at which training stops."""
    note: str = ""
    """Where the published recipe differs from what is run here."""

    def __post_init__(self) -> None:
        check_task(self.task)
        if self.protocol not in PROTOCOLS:
            raise ConfigError(f"unknown protocol {self.protocol!r}; known: {', '.join(PROTOCOLS)}")
        for name in ("data", "mixers", "mlp", "layer_pattern"):
            check_numbers(f"recipe {self.name}: {name}", getattr(self, name))
        for name in ("d_model", "n_layer", "batch_size", "accumulation", "steps", "log_every", "eval_examples"):
            self._check(name, 1 <= getattr(self, name) < 1 << 31, "from 1 to 2,147,483,647")
        self._check("n_layer", self.n_layer <= LAYERS, f"at most {LAYERS:,}")
        for name in ("warmup_steps", "weight_decay", "clip", "patience"):
            self._check(name, 0 <= getattr(self, name) < math.inf, "0 or more")
        self._check("learning_rate", 0 < self.learning_rate < math.inf, "positive")
        self._check("beta2", 0 <= self.beta2 < 1, "from 0 to below 1")
        self._check("enough", 0 < self.enough <= 1, "above 0 and at most 1")
        self._check("seed", 0 <= self.seed < 1 << 32, f"from 0 to {(1 << 32) - 1:,}")
        if self.task in RECALL:
            full_options(RECALL[self.task], self.data)
        elif self.data:
            generator_options(TASKS[self.task], self.data)
        whole = self.eval_every >= 1 and self.eval_every % self.log_every == 0
        self._check("eval_every", whole, f"a multiple of log_every={self.log_every}")
        self._check("schedule", self.schedule in _SCHEDULES, f"one of {', '.join(_SCHEDULES)}")
        images = ("image", "pathfinder", "pathx", "pathfinder256")
        self._check("numbers", not self.numbers or self.task in images, f"False but for {', '.join(images)}")
        self._check("dtype", self.dtype in ("float32", "bfloat16"), "float32 or bfloat16")
        self._check("backend", self.backend in ("auto", *BACKENDS), f"one of auto, {', '.join(BACKENDS)}")
        for name, mixer in self.mixers.items():
            right = isinstance(mixer, Mapping) and isinstance(mixer.get("kind"), str)
            self._check(f"mixers.{name}", right, 'an object with a kind, like {"kind": "mamba"}', mixer)
        absent = sorted({str(m["kind"]) for m in self.mixers.values()} - set(MIXERS))
        if absent:
            raise ConfigError(
                f"recipe {self.name} needs the mixer {', '.join(absent)}, which this version does not have; "
                f"it has: {', '.join(MIXERS)}"
            )
        ahead = sorted(
            {
                str(m["kind"])
                for name, m in self.mixers.items()
                if looks_ahead(checked_mixer(f"recipe {self.name}: mixers.{name}", m))
            }
        )
        if self.task in RECALL and ahead:
            raise ConfigError(
                f"recipe {self.name}: {', '.join(ahead)} reads what follows, and {self.task} asks for the next token; "
                "use a causal mixer"
            )

    def _check(self, name: str, right: bool, allowed: str, value: Any = _FIELD) -> None:
        if not right:
            value = getattr(self, name) if value is _FIELD else value
            raise ConfigError(f"recipe {self.name}: {name} must be {allowed}, got {value!r}")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        known = {f.name for f in dataclasses.fields(cls)}
        if values.keys() != known:
            wrong = ", ".join(sorted(values.keys() ^ known))
            raise ConfigError(f"this recipe was written by another version: it differs in {wrong}; start a new run")
        return cls(**values)


# Few arguments: adding five digits modulo ten takes longer to learn than nesting, which the task is about.
_SHORT_LISTS = {"max_depth": 5, "max_args": 3, "min_length": 10, "max_length": 48}
_SMALL: dict[str, dict[str, Any]] = {
    "listops": {
        "data": _SHORT_LISTS | {"train": 100_000, "validation": 1000, "test": 2000},
        "n_layer": 4, "mlp": _GLU, "batch_size": 64, "steps": 5000, "learning_rate": 2e-3, "eval_every": 500,
    },
    "pathfinder": {
        "data": {"size": 16, "train": 40_000, "validation": 2000, "test": 2000}, "numbers": True,
        # Steps as for sequences of hundreds, where the published ones suit thousands.
        "mixers": {"m": {"kind": "s4d", "bidirectional": True, "d_state": 16, "n_ssm": 64, "dt_min": 5e-3,
                         "dt_max": 0.5}},
        "n_layer": 4, "steps": 6000, "learning_rate": 4e-3, "warmup_steps": 300, "eval_every": 500,
    },
}  # fmt: skip
_TINY: dict[str, Any] = {
    "d_model": 16, "n_layer": 1, "batch_size": 8, "steps": 12, "warmup_steps": 2, "log_every": 2, "eval_every": 4,
    "eval_examples": 16,
}  # fmt: skip
_RECALL: dict[str, Any] = {
    "batch_size": 32, "steps": 2000, "learning_rate": 4e-3, "weight_decay": 0.1, "beta2": 0.98, "enough": 0.99,
    "eval_every": 100, "eval_examples": 512,
}  # fmt: skip
# Random filler would often be a key in a vocabulary as small as this one.
_MQAR = {"data": {"seqlen": 64, "pairs": 8, "vocab_size": 128, "random_filler": False}}
_OWN: dict[str, dict[str, dict[str, Any]]] = {
    "small": {
        **_SMALL,
        **{name: _RECALL for name in RECALL},
        "mqar": _RECALL | _MQAR,
    },
    "far": {
        "copying": {
            "data": {"seqlen": 2048, "tokens": 4, "hold": 64},
            "d_model": 32,
            "mixers": {"m": {"kind": "s4d"}},
            "batch_size": 8,
            "steps": 400,
            "learning_rate": 1e-2,
            "warmup_steps": 20,
            "weight_decay": 0.0,
            "enough": 0.95,
            "eval_every": 40,
            "eval_examples": 64,
        }
    },
    "tiny": {
        "listops": _TINY | {"data": _SHORT_LISTS | {"train": 200, "validation": 40, "test": 60}},
        "pathfinder": _TINY | {"data": {"size": 16, "train": 60, "validation": 20, "test": 20}},
        **{name: _TINY for name in RECALL},
    },
}
"""Our own: "small" learns on two cores in minutes to an hour, "tiny" is for tests and first steps, "far" asks for four
symbols 1,800 positions later, which state spaces and long convolutions of that reach learn in minutes and short
convolutions never."""


def check_task(name: str) -> None:
    """Raise ConfigError unless there is such a task."""
    if name not in TASKS and name not in RECALL:
        known = [*TASKS, *RECALL]
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"unknown task {name!r}; {hint}known: {', '.join(known)}")


def recipe_names(task: str) -> list[str]:
    """Recipes there are for a task."""
    return [name for name, by_task in (_OWN | PUBLISHED).items() if task in by_task]


def find_recipe(name: str, task: str) -> Recipe:
    """A recipe by name and task.

    Raises:
        ConfigError: there is none, or it needs a mixer that this version lacks.
    """
    known = _OWN | PUBLISHED
    check_task(task)
    if name not in known or task not in known[name]:
        raise ConfigError(f"there is no recipe {name!r} for {task}; known: {', '.join(recipe_names(task))}")
    return Recipe(name=name, task=task, **known[name][task])
