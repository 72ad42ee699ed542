"""Falcon-H1: attention and Mamba-2 side by side in every layer, with multipliers everywhere.

Source: transformers, models/falcon_h1; Zuo et al. 2025 (arXiv 2507.22448).
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
    inner = v["mamba_d_ssm"] or v["mamba_expand"] * v["hidden_size"]
    ssm = mamba2(
        v,
        d_inner=inner,
        norm=v["mamba_rms_norm"],
        norm_before_gate=v["mamba_norm_before_gate"],
        in_scales=v["ssm_multipliers"],
        out_bias=v["projectors_bias"],
    )
    heads = attention(v, **rope(v))
    heads["scale"] = heads["headdim"] ** -0.5 * v["key_multiplier"]
    gate, out = v["mlp_multipliers"]
    layers = {
        "kind": "sum",
        "mixers": [ssm, heads],
        "in_scales": [v["ssm_in_multiplier"], v["attention_in_multiplier"]],
        "out_scales": [v["ssm_out_multiplier"], v["attention_out_multiplier"]],
    }
    mlp = {"d_mlp": v["intermediate_size"], "bias": v["mlp_bias"], "gate_scale": gate}
    return {
        **language_model(v),
        "n_layer": v["num_hidden_layers"],
        "layer_pattern": ["h"],
        "mixers": {"h": layers},
        "blocks": {"h": {"mlp": mlp, "mlp_scale": out}},
        "embed_scale": v["embedding_multiplier"],
        "logit_scale": v["lm_head_multiplier"],
    }


def _parts(v: Values, config: SeqlibConfig) -> Iterator[Part]:
    yield from top("model.embed_tokens.weight", "model.final_layernorm.weight")
    names = {
        "norm.weight": "input_layernorm.weight",
        "mlp_norm.weight": "pre_ff_layernorm.weight",
        **within("mixer.mixers.0.", "mamba.", MAMBA2),
        **within("mixer.mixers.1.", "self_attn.", ATTENTION),
        **within("mlp.", "feed_forward.", GLU),
    }
    for i in range(config.n_layer):
        yield from layer(i, f"model.layers.{i}.", names)


FAMILIES = (
    ported("falcon_h1", "falcon_h1", _config, _parts, known=LEGACY | {"mamba_use_mlp", "mlp_expansion_factor"}),
)
