"""Published layouts: one file per family, and the table of them all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from seqlib.errors import CheckpointMismatch
from seqlib.hf.families import (
    bamba,
    based,
    delta,
    falcon_h1,
    fla,
    granite,
    jamba,
    mamba,
    minimax,
    nemotron_h,
    recurrent_gemma,
    transnormer,
    xlstm,
    zamba2,
)
from seqlib.hf.families.base import GENERIC, Family

__all__ = ["FAMILIES", "recognise"]

_MODULES = (
    mamba,
    jamba,
    bamba,
    zamba2,
    falcon_h1,
    nemotron_h,
    granite,
    minimax,
    recurrent_gemma,
    delta,
    xlstm,
    transnormer,
    based,
    fla,
)
FAMILIES: dict[str, Family] = {family.name: family for module in _MODULES for family in module.FAMILIES}
"""By the name that `seqlib.export` takes."""


def recognise(source: object, values: dict[str, Any], ignore: Iterable[str] = ()) -> tuple[Family, dict[str, Any]]:
    """The family of a config, and the config with every field that counts.

    Raises:
        CheckpointMismatch: no family has such configs, or the family has no such fields.
    """
    family = next((f for f in FAMILIES.values() if f.matches(values)), None)
    if family is None:
        kind = values.get("model_type")
        raise CheckpointMismatch(
            f"{source} is of no layout known here ({f'model_type {kind!r}' if kind else 'no model_type'}); known: "
            f"{', '.join(FAMILIES)}"
        )
    full = family.defaults(values)
    unknown = sorted(values.keys() - full.keys() - family.known - GENERIC - set(ignore))
    if unknown:
        raise CheckpointMismatch(
            f"{source}: {family.name} has no field {', '.join(unknown)}, so its models may compute something else; if "
            f"you know that they change nothing, pass ignore={tuple(unknown)}"
        )
    return family, full
