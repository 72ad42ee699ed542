"""Jamba: Mamba-1 with norms inside and attention in turns, experts in every second MLP.

Source: transformers, models/jamba; Lieber et al. 2024 (arXiv 2403.19887).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from seqlib.hf.configuration import SeqlibConfig
from seqlib.hf.families.base import Part, Values, expect, layer, ported, top, within
from seqlib.hf.families.common import ATTENTION, GLU, LEGACY, attention, experts, language_model
from seqlib.hf.families.mamba import MAMBA

__all__ = ["FAMILIES"]


def _config(v: Values, match: str) -> dict[str, Any]:
    expect("jamba", v, hidden_act=("silu", "swish"), mamba_inner_layernorms=True)
    mixer = {
        "kind": "mamba",
        "d_state": v["mamba_d_state"],
        "d_conv": v["mamba_d_conv"],
        "expand": v["mamba_expand"],
        "dt_rank": None if v["mamba_dt_rank"] == "auto" else v["mamba_dt_rank"],
        "conv_bias": v["mamba_conv_bias"],
        "bias": v["mamba_proj_bias"],
        "inner_norm": "learned",
        "inner_norm_eps": v["rms_norm_eps"],
    }
    dense = {"d_mlp": v["intermediate_size"]}
    routed = dense | {"nexperts": v["num_experts"], "top_k": v["num_experts_per_tok"], "normalize": False}
    pattern = []
    for i in range(v["num_hidden_layers"]):
        name = "a" if i % v["attn_layer_period"] == v["attn_layer_offset"] else "m"
        is_routed = i % v["expert_layer_period"] == v["expert_layer_offset"] and v["num_experts"] > 1
        pattern.append(name + "e" if is_routed else name)
    kinds = {"m": mixer, "me": mixer, "a": attention(v), "ae": attention(v)}
    return {
        **language_model(v),
        "n_layer": len(pattern),
        "layer_pattern": pattern,
        "mixers": {name: kinds[name] for name in dict.fromkeys(pattern)},
        "mlp": dense,
        "blocks": {name: {"mlp": routed} for name in dict.fromkeys(pattern) if name.endswith("e")},
    }


def _parts(v: Values, config: SeqlibConfig) -> Iterator[Part]:
    yield from top("model.embed_tokens.weight", "model.final_layernorm.weight")
    norms = {"norm.weight": "input_layernorm.weight", "mlp_norm.weight": "pre_ff_layernorm.weight"}
    inner = {f"{our}_norm": f"{their}_layernorm.weight" for our, their in (("dt", "dt"), ("B", "b"), ("C", "c"))}
    routed = {"router.weight": "router.weight", **experts(v["num_experts"])}
    for i, name in enumerate(config.backbone.layer_pattern):
        yield from layer(
            i,
            f"model.layers.{i}.",
            norms,
            within("mixer.", "self_attn.", ATTENTION)
            if name[0] == "a"
            else within("mixer.", "mamba.", {**MAMBA, **inner}),
            within("mlp.", "feed_forward.", routed if name.endswith("e") else GLU),
        )


FAMILIES = (
    ported(
        "jamba",
        "jamba",
        _config,
        _parts,
        known=LEGACY
        | {"mamba_inner_layernorms", "calc_logits_for_entire_prompt", "layers_block_type", "sliding_window"},
    ),
)
