"""Bamba: Mamba-2 with a few layers of attention.

Source: transformers, models/bamba.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from seqlib.hf.configuration import SeqlibConfig
from seqlib.hf.families.base import Part, Values, layer, ported, top, within
from seqlib.hf.families.common import ATTENTION, GLU, LEGACY, attention, language_model, mamba2, rope
from seqlib.hf.families.mamba import MAMBA2

__all__ = ["FAMILIES"]


def _config(v: Values, match: str) -> dict[str, Any]:
    at = set(v["attn_layer_indices"] or ())
    pattern = ["a" if i in at else "m" for i in range(v["num_hidden_layers"])]
    kinds = {"a": attention(v, **rope(v)), "m": mamba2(v)}
    return {
        **language_model(v),
        "n_layer": len(pattern),
        "layer_pattern": pattern,
        "mixers": {name: kinds[name] for name in dict.fromkeys(pattern)},
        "mlp": {"d_mlp": v["intermediate_size"], "bias": v["mlp_bias"]},
    }


def _parts(v: Values, config: SeqlibConfig) -> Iterator[Part]:
    yield from top("model.embed_tokens.weight", "model.final_layernorm.weight")
    around = {
        "norm.weight": "input_layernorm.weight",
        "mlp_norm.weight": "pre_ff_layernorm.weight",
        **within("mlp.", "feed_forward.", GLU),
    }
    mixers = {"a": within("mixer.", "self_attn.", ATTENTION), "m": within("mixer.", "mamba.", MAMBA2)}
    for i, name in enumerate(config.backbone.layer_pattern):
        yield from layer(i, f"model.layers.{i}.", around, mixers[name])


FAMILIES = (ported("bamba", "bamba", _config, _parts, known=LEGACY | {"z_loss_coefficient", "layer_types"}),)
