"""What a stack of blocks looks like: a value that can be printed, stored and compared."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from seqlib.errors import ConfigError
from seqlib.fields import from_fields
from seqlib.layers.mlp import MLPConfig
from seqlib.layers.moe import channel_config
from seqlib.mixers import MixerConfig, mixer_config
from seqlib.models.aside import AsideConfig

__all__ = ["BackboneConfig", "BlockConfig", "expand_pattern"]


_MOST_LAYERS = 16384
"""Far beyond any model; a larger number is a mistake, and would take all memory before that shows."""


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """What stands around the mixer in the layers of one name."""

    mlp: MLPConfig | None = None
    """Channel mixer after the sequence mixer; None for none."""
    norm: str = "pre"
    """"pre": x + f(norm(x));  "post": x + norm(f(x)) (OLMo);  "stream": n + f(n) with n = norm(x) (MiniMax)."""
    mixer_scale: float = 1.0
    mlp_scale: float = 1.0
    """Factors of what each branch adds."""
    mixer_skip: float = 1.0
    mlp_skip: float = 1.0
    """Factors of what it is added to."""
    aside: bool = False
    """The mixer also reads what a block of `BackboneConfig.aside` makes of x."""

    def __post_init__(self) -> None:
        if self.norm not in ("pre", "post", "stream"):
            raise ConfigError(f"block: norm must be 'pre', 'post' or 'stream', got {self.norm!r}")
        if self.aside and self.norm != "pre":
            raise ConfigError(f"block: aside needs norm='pre', got {self.norm!r}")
        object.__setattr__(self, "mlp", channel_config(self.mlp))

    def to_dict(self) -> dict[str, Any]:
        """Plain values that differ from the defaults."""
        changed = {f.name: v for f in dataclasses.fields(self) if (v := getattr(self, f.name)) != f.default}
        return changed if self.mlp is None else changed | {"mlp": self.mlp.to_dict()}


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """A stack of `n_layer` blocks whose mixers follow `layer_pattern`.

    >>> config = BackboneConfig(d_model=64, n_layer=3, mixers={"m": {"kind": "mamba"}}, layer_pattern="m")
    >>> config.layer_pattern
    ('m', 'm', 'm')
    """

    d_model: int
    """Residual width."""
    n_layer: int
    mixers: Mapping[str, MixerConfig]
    """Mixer configs (or plain dicts with a `kind`) by the names that the pattern uses."""
    layer_pattern: tuple[str, ...]
    """A name per layer. The short form "m*5 a" is expanded, and tiled over n_layer, when the config is made."""
    mlp: MLPConfig | None = None
    """Channel mixer after every sequence mixer; None for none, as in Mamba."""
    blocks: Mapping[str, BlockConfig] = dataclasses.field(default_factory=dict)
    """Blocks of the layers with these names of the pattern; layers with other names have `mlp` in a plain block."""
    aside: AsideConfig | None = None
    """Transformer blocks that several layers share, see `BlockConfig.aside`."""
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    """Norms multiply by their weight plus this (1 in Gemma and Qwen3-Next, where weights start at 0)."""
    residual_in_fp32: bool = True
    """Keep the residual stream in float32 whatever the dtype of the parameters."""
    tile: str = "exact"
    """"exact": the pattern's length must divide n_layer; "truncate": the last repetition may be cut (Griffin)."""

    def __post_init__(self) -> None:
        for name in ("d_model", "n_layer"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a positive integer, got {value!r}")
        if self.n_layer > _MOST_LAYERS:
            raise ConfigError(f"n_layer must be at most {_MOST_LAYERS:,}, got {self.n_layer:,}")
        if self.tile not in ("exact", "truncate"):
            raise ConfigError(f"tile must be 'exact' or 'truncate', got {self.tile!r}")
        set_ = object.__setattr__  # the stored value is always the expanded one
        set_(self, "mixers", {name: mixer_config(values) for name, values in self.mixers.items()})
        set_(self, "layer_pattern", expand_pattern(self.layer_pattern, self.n_layer, self.mixers, self.tile))
        set_(self, "mlp", channel_config(self.mlp))
        set_(self, "blocks", {name: _block(values) for name, values in self.blocks.items()})
        unused = sorted(self.blocks.keys() - set(self.layer_pattern))
        if unused:
            raise ConfigError(f"blocks {', '.join(unused)} do not occur in layer_pattern; remove or use them")
        if isinstance(self.aside, Mapping):
            set_(self, "aside", from_fields(AsideConfig, self.aside, "aside config"))
        if any(block.aside for block in self.blocks.values()) != (self.aside is not None):
            raise ConfigError("blocks aside need both BackboneConfig.aside and a layer whose block has aside=True")

    def block(self, layer_index: int) -> BlockConfig:
        """What stands around the mixer of one layer."""
        return self.blocks.get(self.layer_pattern[layer_index]) or BlockConfig(mlp=self.mlp)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold; `from_dict` reads them back exactly."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return plain | {
            "mixers": {name: config.to_dict() for name, config in self.mixers.items()},
            "layer_pattern": list(self.layer_pattern),
            "mlp": None if self.mlp is None else self.mlp.to_dict(),
            "blocks": {name: block.to_dict() for name, block in self.blocks.items()},
            "aside": None if self.aside is None else self.aside.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BackboneConfig:
        pattern = values.get("layer_pattern")  # whose short form is one text
        named = {**values, "layer_pattern": pattern.split()} if isinstance(pattern, str) else values
        return from_fields(cls, named, "backbone config")


def expand_pattern(
    pattern: str | list[str] | tuple[str, ...], n_layer: int, names: Mapping[str, Any], tile: str = "exact"
) -> tuple[str, ...]:
    """The explicit name of every layer.

    >>> expand_pattern("m*2 a", 6, {"m": 0, "a": 0})
    ('m', 'm', 'a', 'm', 'm', 'a')
    """
    words = pattern.split() if isinstance(pattern, str) else list(pattern)
    unit: list[str] = []
    for word in words:
        found = re.fullmatch(r"(\w+)(?:\*(\d+))?", word)
        if found is None or found[1] not in names or found[2] == "0":
            raise ConfigError(
                f"layer_pattern has {word!r}; write names of mixers, each alone or as name*count: {', '.join(names)}"
            )
        unit += [found[1]] * min(int(found[2] or 1), n_layer + 1)
    if not unit or len(unit) > n_layer or (n_layer % len(unit) and tile == "exact"):
        raise ConfigError(
            f"layer_pattern {pattern!r} describes {len(unit)} layers, which do not tile n_layer={n_layer}; "
            "change one of them, or set tile='truncate' to cut the last repetition"
        )
    unused = sorted(names.keys() - set(unit))
    if unused:
        raise ConfigError(f"mixers {', '.join(unused)} do not occur in layer_pattern {pattern!r}; remove or use them")
    return tuple((unit * -(-n_layer // len(unit)))[:n_layer])


def _block(values: Mapping[str, Any] | BlockConfig) -> BlockConfig:
    return values if isinstance(values, BlockConfig) else from_fields(BlockConfig, values, "block config")
