"""MiniMax-Text-01: seven lightning layers, then one of attention, experts after each, residuals from the norms.

Source: transformers, models/minimax; MiniMax 2025 (arXiv 2501.08313) and its code on the Hub. That code rotates
`rotary_dim` features of each head, transformers' port all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from seqlib.hf.configuration import SeqlibConfig
from seqlib.hf.families.base import Part, Values, expect, layer, linear, ported, rows, top, within
from seqlib.hf.families.common import ATTENTION, LEGACY, attention, experts, language_model, rope

__all__ = ["FAMILIES"]

# Their code on the Hub says it in other words.
_OLD = {
    f"layernorm_{part}_{kind}" for part in ("linear_attention", "full_attention", "mlp") for kind in ("alpha", "beta")
}
_OLD |= {"attn_type_list", "decoder_attention_types", "block", "rotary_dim", "postnorm", "shared_intermediate_size"}
_OLD |= {"shared_moe_mode", "layernorm_full_attention_alpha"}


def _factor(v: Values, part: str, kind: str) -> float:
    old = {"linear_attn": "linear_attention", "full_attn": "full_attention", "mlp": "mlp"}[part]
    return float(v.get(f"layernorm_{old}_{kind}", v[f"{part}_{kind}_factor"]))


def _config(v: Values, match: str) -> dict[str, Any]:
    expect("minimax", v, hidden_act=("silu", "swish"), postnorm=True, shared_intermediate_size=(0, None))
    given = v.get("attn_type_list") or v.get("decoder_attention_types")
    types = ["full_attention" if t else "linear_attention" for t in given] if given else v["layer_types"]
    pattern = ["a" if t == "full_attention" else "l" for t in types]
    heads = attention(v)
    headdim = heads["headdim"]
    # eps of the norm of the lightning layers is that of the code, not of the config.
    lightning = {"kind": "lightning", "nheads": v["num_attention_heads"], "headdim": headdim, "variant": "minimax"}
    kinds = {"l": lightning, "a": heads | rope(v, None if match == "transformers" else headdim)}
    if v.get("sliding_window"):
        kinds["a"]["window"] = v["sliding_window"]
    mlp = {"d_mlp": v["intermediate_size"], "nexperts": v["num_local_experts"], "top_k": v["num_experts_per_tok"]}
    blocks = {
        name: {
            "mlp": mlp,
            "norm": "stream",
            "mixer_skip": _factor(v, part, "alpha"),
            "mixer_scale": _factor(v, part, "beta"),
            "mlp_skip": _factor(v, "mlp", "alpha"),
            "mlp_scale": _factor(v, "mlp", "beta"),
        }
        for name, part in (("l", "linear_attn"), ("a", "full_attn"))
        if name in pattern
    }
    return {
        **language_model(v),
        "n_layer": len(pattern),
        "layer_pattern": pattern,
        "mixers": {name: kinds[name] for name in dict.fromkeys(pattern)},
        "blocks": blocks,
    }


def _parts(v: Values, config: SeqlibConfig) -> Iterator[Part]:
    yield from top("model.embed_tokens.weight", "model.norm.weight")
    nheads = v["num_attention_heads"]
    headdim = v.get("head_dim") or v["hidden_size"] // nheads
    # Theirs: q, k, v of each head, then the gates of all; ours: q, k, v, gate.
    qkv = torch.arange(3 * nheads * headdim).view(nheads, 3, headdim).transpose(0, 1).flatten()
    order = torch.cat([qkv, 3 * nheads * headdim + torch.arange(nheads * headdim)])
    shares = (3 * nheads * headdim, nheads * headdim)
    lightning = {
        **rows("qkvu_proj.weight", ("qkv_proj.weight", "output_gate.weight"), order=order, shares=shares),
        "norm_weight": "norm.weight",
        **linear("out_proj"),
    }
    around = {
        "norm.weight": "input_layernorm.weight",
        "mlp_norm.weight": "post_attention_layernorm.weight",
        "mlp.router.weight": "block_sparse_moe.gate.weight|mlp.gate.weight",
        **within("mlp.", "block_sparse_moe.", experts(v["num_local_experts"], "w1", "w3", "w2")),
    }
    mixers = {"a": within("mixer.", "self_attn.", ATTENTION), "l": within("mixer.", "self_attn.", lightning)}
    for i, name in enumerate(config.backbone.layer_pattern):
        yield from layer(i, f"model.layers.{i}.", around, mixers[name])


FAMILIES = (
    ported(
        "minimax",
        "minimax",
        _config,
        _parts,
        also=("minimax_text_01", "minimax_m1"),
        known=LEGACY | frozenset(_OLD),
        ignored=(r"\.(slope_rate|query_decay|key_decay|diagonal_decay)$",),
    ),
)
