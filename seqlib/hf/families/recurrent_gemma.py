"""RecurrentGemma (Griffin): RG-LRU blocks and local attention with one key head.

Source: transformers, models/recurrent_gemma; google-deepmind/recurrentgemma, whose window includes one key more than
that of transformers' port.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from seqlib.hf.configuration import SeqlibConfig
from seqlib.hf.families.base import Names, Part, Values, conv, expect, layer, linear, ported, rows, top, within
from seqlib.hf.families.common import ATTENTION, GLU, LEGACY, attention, language_model, rope

__all__ = ["FAMILIES"]


def _config(v: Values, match: str) -> dict[str, Any]:
    expect("recurrent_gemma", v, hidden_activation=("gelu_pytorch_tanh", None), hidden_act="gelu_pytorch_tanh")
    types = v["block_types"]
    pattern = ["a" if types[i % len(types)] == "attention" else "r" for i in range(v["num_hidden_layers"])]
    window = v["attention_window_size"] + (match == "authors")
    heads = attention(v, **rope(v), window=window, out_bias=True)
    unit = {
        "kind": "rg_lru",
        "d_inner": v["lru_width"] or v["hidden_size"],
        "nheads": v["num_attention_heads"],
        "d_conv": v["conv1d_width"],
    }
    kinds = {"a": heads, "r": unit}
    return {
        **language_model(v),
        "n_layer": len(pattern),
        "layer_pattern": pattern,
        "mixers": {name: kinds[name] for name in dict.fromkeys(pattern)},
        "mlp": {"d_mlp": v["intermediate_size"] // 2, "activation": "gelu_tanh", "bias": True},
        "norm_offset": 1.0,
        "embed_scale": float(torch.tensor(v["hidden_size"] ** 0.5, dtype=torch.bfloat16)),
        "logit_softcap": v["logits_soft_cap"],
    }


def _parts(v: Values, config: SeqlibConfig) -> Iterator[Part]:
    yield from top("model.embed_tokens.weight", "model.final_norm.weight")
    unit: Names = {
        **rows("in_proj.weight", ("linear_x.weight", "linear_y.weight")),
        **rows("in_proj.bias", ("linear_x.bias", "linear_y.bias")),
        **conv("conv_1d"),
        "input_gate": "rg_lru.input_gate_weight",
        "input_gate_bias": "rg_lru.input_gate_bias",
        "decay_gate": "rg_lru.recurrent_gate_weight",
        "decay_gate_bias": "rg_lru.recurrent_gate_bias",
        "decay": "rg_lru.recurrent_param",
        **linear(out_proj="linear_out"),
    }
    around = {
        "norm.weight": "temporal_pre_norm.weight",
        "mlp_norm.weight": "channel_pre_norm.weight",
        **within("mlp.", "mlp_block.", GLU),
    }
    mixers = {"a": within("mixer.", "temporal_block.", ATTENTION), "r": within("mixer.", "temporal_block.", unit)}
    for i, name in enumerate(config.backbone.layer_pattern):
        yield from layer(i, f"model.layers.{i}.", around, mixers[name])


_KNOWN = LEGACY | {"layers_block_type", "layer_types", "w_init_variance_scale", "final_w_init_variance_scale"}
FAMILIES = (
    ported("recurrent_gemma", "recurrent_gemma", _config, _parts, known=_KNOWN | {"_block_types", "hidden_act"}),
)
