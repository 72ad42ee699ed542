"""Granite 4 hybrid: Mamba-2 and attention, each followed by routed experts beside a shared one, scaled throughout.

Source: transformers, models/granitemoehybrid.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from seqlib.hf.configuration import SeqlibConfig
from seqlib.hf.families.base import Names, Part, Values, layer, ported, rows, top, within
from seqlib.hf.families.common import ATTENTION, LEGACY, attention, language_model, mamba2, rope
from seqlib.hf.families.mamba import MAMBA2

__all__ = ["FAMILIES"]


def _config(v: Values, match: str) -> dict[str, Any]:
    pattern = ["a" if kind == "full_attention" else "m" for kind in v["layer_types"]]
    heads = attention(v, scale=v["attention_multiplier"])
    if v["position_embedding_type"] == "rope":
        heads |= rope(v)
    mlp = {"d_mlp": v["shared_intermediate_size"]}
    if v["num_local_experts"]:
        mlp = {
            "d_mlp": v["intermediate_size"],
            "nexperts": v["num_local_experts"],
            "top_k": v["num_experts_per_tok"],
            "score": "chosen_softmax",
            "d_shared": v["shared_intermediate_size"],
        }
    kinds, names, scale = {"a": heads, "m": mamba2(v)}, dict.fromkeys(pattern), v["residual_multiplier"]
    return {
        **language_model(v),
        "n_layer": len(pattern),
        "layer_pattern": pattern,
        "mixers": {name: kinds[name] for name in names},
        "blocks": {name: {"mlp": mlp, "mixer_scale": scale, "mlp_scale": scale} for name in names},
        "embed_scale": v["embedding_multiplier"],
        "logit_scale": 1 / v["logits_scaling"],
    }


def _parts(v: Values, config: SeqlibConfig) -> Iterator[Part]:
    yield from top("model.embed_tokens.weight", "model.norm.weight")
    shared: Names = {
        **rows(("gate_proj.weight", "up_proj.weight"), "input_linear.weight"),
        "down_proj.weight": "output_linear.weight",
    }
    around: Names = {
        "norm.weight": "input_layernorm.weight",
        "mlp_norm.weight": "post_attention_layernorm.weight",
        **within("mlp.shared." if v["num_local_experts"] else "mlp.", "shared_mlp.", shared),
        "mlp.router.weight": "block_sparse_moe.router.layer.weight|block_sparse_moe.router.weight",
        "mlp.in_weight": "block_sparse_moe.input_linear.weight|block_sparse_moe.experts.gate_up_proj",
        "mlp.out_weight": "block_sparse_moe.output_linear.weight|block_sparse_moe.experts.down_proj",
    }
    mixers = {"a": within("mixer.", "self_attn.", ATTENTION), "m": within("mixer.", "mamba.", MAMBA2)}
    for i, name in enumerate(config.backbone.layer_pattern):
        yield from layer(i, f"model.layers.{i}.", around, mixers[name])


FAMILIES = (ported("granite_hybrid", "granitemoehybrid", _config, _parts, known=LEGACY),)
