"""Fields of configs: a value of a wrong type or beyond what a machine can hold is refused by the name of the field."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import torch
from test_mixers import D_MODEL, VARIANTS

from seqlib.errors import ConfigError, SeqlibError
from seqlib.layers.mlp import MLPConfig
from seqlib.layers.moe import MoEConfig, channel_config
from seqlib.mixers import MIXERS, build_mixer, mixer_config
from seqlib.models import BackboneConfig
from seqlib.models.aside import AsideConfig
from seqlib.models.config import BlockConfig

NAN = float("nan")
VALUES: dict[str, list[Any]] = {
    "int": [3],
    "float": [0.5],
    "bool": [True],
    "str": ["abc"],
    "none": [None],
    "NaN": [NAN],
    "floats": [[0.5, 1.0], (2.0,)],
    "texts": [["abc"]],
    "object": [{"kind": "mamba"}],
    "objects": [[{"kind": "mamba"}, {"kind": "gla"}]],
    "odd list": [[None], [[1]], ["a", 1], [NAN], b"abc"],
    "thing": [object()],
}
_SMALL = {"d_model": 32, "n_layer": 1, "mixers": {"m": {"kind": "mamba"}}, "layer_pattern": "m"}
_MLP = {"d_mlp": 8}


def _stack(values: dict) -> BackboneConfig:
    return BackboneConfig.from_dict({**_SMALL, **values})


def _mixer(kind: str) -> Callable[[dict], Any]:
    return lambda values: mixer_config({"kind": kind, **(VARIANTS.get(kind) or [{}])[0], **values})


READERS: dict[str, tuple[type, Callable[[dict], Any]]] = {
    **{kind: (mixer.Config, _mixer(kind)) for kind, mixer in MIXERS.items()},
    "mlp": (MLPConfig, channel_config),
    "experts": (MoEConfig, lambda values: channel_config({"nexperts": 2, **values})),
    "backbone": (BackboneConfig, _stack),
    "block": (BlockConfig, lambda values: _stack({"blocks": {"m": values}})),
    "aside": (AsideConfig, lambda values: _stack({"blocks": {"m": {"aside": True}}, "aside": {**_MLP, **values}})),
}
FIELDS = [(name, f.name) for name, (cls, _) in READERS.items() for f in dataclasses.fields(cls) if f.name != "kind"]


def wrong(hint: Any) -> list[Any]:
    """Values of every kind that a declaration does not allow."""
    allowed = set()
    for part in get_args(hint) if get_origin(hint) not in (tuple, None) and type(None) in get_args(hint) else (hint,):
        if part is float:
            allowed |= {"int", "float"}
        elif get_origin(part) is tuple:
            inner = get_args(part)[0]
            allowed |= {float: {"floats"}, str: {"texts"}}.get(inner, {"objects"})
        else:
            allowed.add({int: "int", bool: "bool", str: "str", type(None): "none"}.get(part, "object"))
    return [value for kind, values in VALUES.items() if kind not in allowed for value in values]


@pytest.mark.parametrize(("name", "field"), FIELDS, ids=str)
def test_a_value_of_another_type_is_refused_by_name(name: str, field: str) -> None:
    cls, read = READERS[name]
    values = wrong(get_type_hints(cls)[field])
    if (name, field) == ("backbone", "layer_pattern"):  # whose short form is one text
        values = [value for value in values if not isinstance(value, str)]
    if field == "mlp":  # null is a plain MLP, or none
        values = [value for value in values if value is not None]
    assert values
    for value in values:
        with pytest.raises(ConfigError) as told:
            read({field: value})
        assert field in str(told.value) and repr(value)[:20] in str(told.value), value


@pytest.mark.parametrize(("name", "field"), [pair for pair in FIELDS if pair[0] in MIXERS], ids=str)
def test_values_at_the_ends_of_their_range_build_or_are_refused(name: str, field: str) -> None:
    """On the meta device: parameters may be larger than this machine."""
    cls, read = READERS[name]
    hint = get_type_hints(cls)[field]
    kinds = set(get_args(hint) or (hint,))
    values: list[Any] = [-1, 0, 3000, 1 << 16] if int in kinds else []
    values += [-1.0, 0.0, 1e30, -1e30, float("inf"), -float("inf")] if float in kinds else []
    values += ["", "no such word"] if str in kinds else []
    for value in values:
        try:
            config = read({field: value})
            with torch.device("meta"):
                build_mixer(config, D_MODEL)
        except SeqlibError:
            continue
        assert not isinstance(value, str), f"{value!r} was taken"


def test_a_list_of_mixers_is_a_list() -> None:
    with pytest.raises(ConfigError, match="sum: mixers must be a list of objects, got 3"):
        mixer_config({"kind": "sum", "mixers": 3})
