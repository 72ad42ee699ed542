"""Recipes: everything that decides what a training run does, as one value that can be printed, changed and stored."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from seqlib.dispatch import BACKENDS
from seqlib.errors import ConfigError
from seqlib.hf.recipes import LAYERS, check_numbers, checked_mixer

__all__ = ["RECIPES", "Recipe", "demo", "mixer_sweep", "tiny"]

_TOKENS = 1 << 28  # of one forward; more is a mistyped number
_HYBRID: dict[str, Any] = {"m": {"kind": "mamba"}, "a": {"kind": "sliding_attention", "nheads": 4, "window": 128}}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A model and how it is trained."""

    name: str
    d_model: int = 256
    n_layer: int = 6
    layer_pattern: str = "m m a"
    mixers: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: copy.deepcopy(_HYBRID))
    mlp: Mapping[str, Any] | None = None
    tie_embeddings: bool = True
    tokenizer: str = "bytes"
    """"bytes", or a tokenizer that AutoTokenizer opens."""
    seqlen: int = 1024
    """Tokens per row."""
    batch_size: int = 8
    """Rows per forward and process."""
    accumulation: int = 1
    """Forwards per optimizer step."""
    steps: int = 1000
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    final_learning_rate: float = 0.1
    """Where the cosine ends, as a share of learning_rate."""
    weight_decay: float = 0.1
    beta2: float = 0.95
    clip: float = 1.0
    """Largest norm of the gradient; 0 for no clipping."""
    dtype: str = "float32"
    """"float32", or "bfloat16" for mixed precision with float32 weights."""
    backend: str = "auto"
    """Backend of the library's ops."""
    seed: int = 0
    held_out: float = 0.05
    """Share of the text for validation, and the same again for test."""
    log_every: int = 10
    save_every: int = 200
    """Steps between checkpoints, a multiple of log_every, so that a resumed run logs what it would have logged."""
    keep: int = 2
    """Checkpoints that are kept."""
    eval_every: int = 200
    """Steps between evaluations on validation text, a multiple of log_every; 0 for none. The checkpoint of the best is
    kept."""
    eval_bytes: int = 100_000
    """Bytes of validation text per evaluation; whole documents are scored until they are reached."""

    def __post_init__(self) -> None:
        for name in ("mixers", "mlp", "layer_pattern"):
            check_numbers(f"recipe {self.name}: {name}", getattr(self, name))
        for name in ("d_model", "n_layer", "seqlen", "batch_size", "accumulation", "steps", "log_every", "save_every",
                     "keep", "eval_bytes"):  # fmt: skip
            self._check(name, 1 <= getattr(self, name) < 1 << 31, "from 1 to 2,147,483,647")
        self._check("n_layer", self.n_layer <= LAYERS, f"at most {LAYERS:,}")
        self._check("tokens", self.tokens <= _TOKENS, f"at most {_TOKENS:,} (batch_size times seqlen)")
        for name in ("warmup_steps", "weight_decay", "clip", "eval_every"):
            self._check(name, 0 <= getattr(self, name) < 1 << 31, "from 0 to 2,147,483,647")
        self._check("seqlen", self.seqlen >= 2, "at least 2")
        self._check("learning_rate", 0 < self.learning_rate < math.inf, "positive")
        self._check("final_learning_rate", 0 <= self.final_learning_rate <= 1, "between 0 and 1")
        self._check("beta2", 0 < self.beta2 < 1, "between 0 and 1")
        self._check("held_out", 0 < self.held_out < 0.5, "between 0 and 0.5")
        self._check("seed", 0 <= self.seed < 1 << 32, f"from 0 to {(1 << 32) - 1:,}")
        for name in ("save_every", "eval_every"):
            whole = getattr(self, name) % self.log_every == 0
            self._check(name, whole, f"a multiple of log_every={self.log_every}")
        self._check("tokenizer", bool(self.tokenizer.strip()), "'bytes', a folder or a hub name")
        self._check("dtype", self.dtype in ("float32", "bfloat16"), "float32 or bfloat16")
        self._check("backend", self.backend in ("auto", *BACKENDS), f"one of auto, {', '.join(BACKENDS)}")
        for name, mixer in self.mixers.items():
            right = isinstance(mixer, Mapping) and isinstance(mixer.get("kind"), str)
            if not right:
                raise ConfigError(
                    f"recipe {self.name}: mixers.{name} must be an object with a kind, such as "
                    f'{{"kind": "mamba"}}, got {mixer!r}'
                )
            checked_mixer(f"recipe {self.name}: mixers.{name}", mixer)

    @property
    def tokens(self) -> int:
        """Of one forward."""
        return self.batch_size * self.seqlen

    def _check(self, name: str, right: bool, allowed: str) -> None:
        if not right:
            raise ConfigError(f"recipe {self.name}: {name} must be {allowed}, got {getattr(self, name)!r}")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        known = {f.name for f in dataclasses.fields(cls)}
        if values.keys() != known:
            wrong = ", ".join(sorted(values.keys() ^ known))
            raise ConfigError(f"this recipe was written by another version: it differs in {wrong}; start a new run")
        return cls(**values)


def demo() -> Recipe:
    """A Mamba and attention hybrid that learns Python's standard library in about four minutes on two cores."""
    return Recipe(
        name="demo",
        d_model=192,
        n_layer=6,
        seqlen=512,
        batch_size=4,
        steps=4000,  # the demo takes as many of them as fit into its minutes
        learning_rate=4e-3,
        warmup_steps=60,
        save_every=200,
        eval_every=400,  # with these bytes about one step in thirty
        eval_bytes=50_000,
    )


def tiny() -> Recipe:
    """The same in seconds, for tests and first steps."""
    return Recipe(
        name="tiny", d_model=32, n_layer=3, seqlen=64, batch_size=4, steps=20, learning_rate=3e-3, warmup_steps=2,
        log_every=1, save_every=5, eval_every=10, eval_bytes=2000,
    )  # fmt: skip


def mixer_sweep() -> Recipe:
    """What `seqlib-lm sweep` trains once per mixer; alone, it trains softmax attention."""
    return Recipe(
        name="mixer_sweep", d_model=128, n_layer=4, layer_pattern="m", mixers={"m": {"kind": "attention", "nheads": 4}},
        mlp={}, seqlen=512, batch_size=4, steps=500, learning_rate=4e-3, save_every=500, eval_every=250,
    )  # fmt: skip


RECIPES: dict[str, Callable[[], Recipe]] = {"demo": demo, "mixer_sweep": mixer_sweep, "tiny": tiny}
