"""Hybrids around the gated delta rule: Qwen3-Next and OLMo-hybrid.

Source: transformers, models/qwen3_next and models/olmo_hybrid.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from seqlib.hf.configuration import SeqlibConfig
from seqlib.hf.families.base import Names, Part, Values, conv, expect, layer, linear, ported, rows, top, within
from seqlib.hf.families.common import ATTENTION, GLU, LEGACY, attention, experts, language_model, rope

__all__ = ["FAMILIES"]


def _gated_delta(v: Values, **options: Any) -> dict[str, Any]:
    expect(v["model_type"], v, hidden_act=("silu", "swish"))
    return {
        "kind": "gated_deltanet",
        "nheads": v["linear_num_key_heads"],
        "nheads_v": v["linear_num_value_heads"],
        "headdim": v["linear_key_head_dim"],
        "expand_v": v["linear_value_head_dim"] / v["linear_key_head_dim"],
        "d_conv": v["linear_conv_kernel_dim"],
        **options,
    }


def _qwen_config(v: Values, match: str) -> dict[str, Any]:
    expect("qwen3_next", v, use_sliding_window=(False, None))
    heads = attention(v, **rope(v), gate=True, qk_norm=True, qk_norm_eps=v["rms_norm_eps"], qk_norm_offset=1.0)
    kinds = {"l": _gated_delta(v, norm_eps=v["rms_norm_eps"]), "a": heads}
    routed = {
        "d_mlp": v["moe_intermediate_size"],
        "nexperts": v["num_experts"],
        "top_k": v["num_experts_per_tok"],
        "normalize": v["norm_topk_prob"],
        "d_shared": v["shared_expert_intermediate_size"],
        "shared_gate": True,
    }
    pattern = []
    for i, kind in enumerate(v["layer_types"]):
        sparse = (
            v["num_experts"] > 0 and (i + 1) % v["decoder_sparse_step"] == 0 and i not in (v["mlp_only_layers"] or ())
        )
        pattern.append(("a" if kind == "full_attention" else "l") + ("e" if sparse else ""))
    names = dict.fromkeys(pattern)
    return {
        **language_model(v),
        "n_layer": len(pattern),
        "layer_pattern": pattern,
        "mixers": {name: kinds[name[0]] for name in names},
        "mlp": {"d_mlp": v["intermediate_size"]},
        "blocks": {name: {"mlp": routed} for name in names if name.endswith("e")},
        "norm_offset": 1.0,
    }


def _qwen_parts(v: Values, config: SeqlibConfig) -> Iterator[Part]:
    yield from top("model.embed_tokens.weight", "model.norm.weight")
    groups, share = v["linear_num_key_heads"], v["linear_num_value_heads"] // v["linear_num_key_heads"]
    d_key, d_value = v["linear_key_head_dim"], v["linear_value_head_dim"]
    headdim = v.get("head_dim") or v["hidden_size"] // v["num_attention_heads"]
    qkvz = _by_kind(groups, d_key, d_key, share * d_value, share * d_value)
    gated_delta: Names = {
        **rows(("qkv_proj.weight", "g_proj.weight"), "in_proj_qkvz.weight", order=qkvz),
        **rows(("b_proj.weight", "a_proj.weight"), "in_proj_ba.weight", order=_by_kind(groups, share, share)),
        **conv("conv1d"),
        "A_log": "A_log",
        "dt_bias": "dt_bias",
        "norm_weight": "norm.weight",
        **linear(o_proj="out_proj"),
    }
    order = _by_kind(v["num_attention_heads"], headdim, headdim)
    heads: Names = {
        **{k: name for k, name in ATTENTION.items() if not k.startswith("q_proj")},
        **rows(("q_proj.weight", "gate_proj.weight"), "q_proj.weight", order=order),
        **rows(("q_proj.bias", "gate_proj.bias"), "q_proj.bias", order=order),
        "q_norm.weight": "q_norm.weight",
        "k_norm.weight": "k_norm.weight",
    }
    routed: Names = {
        "router.weight": "gate.weight",
        **experts(v["num_experts"]),
        **within("shared.", "shared_expert.", GLU),
        "shared_gate.weight": "shared_expert_gate.weight",
    }
    norms = {"norm.weight": "input_layernorm.weight", "mlp_norm.weight": "post_attention_layernorm.weight"}
    mixers = {"l": within("mixer.", "linear_attn.", gated_delta), "a": within("mixer.", "self_attn.", heads)}
    for i, name in enumerate(config.backbone.layer_pattern):
        mlp = within("mlp.", "mlp.", routed if name.endswith("e") else GLU)
        yield from layer(i, f"model.layers.{i}.", norms, mixers[name[0]], mlp)


def _by_kind(groups: int, *widths: int) -> torch.Tensor:
    """Order of rows that are stored group by group, each with all kinds in it, as kind by kind."""
    stored = torch.arange(groups * sum(widths)).view(groups, -1)
    return torch.cat([part.flatten() for part in stored.split(widths, 1)])


def _olmo_config(v: Values, match: str) -> dict[str, Any]:
    heads = attention(v, qk_norm=True, qk_norm_joint=True, qk_norm_eps=v["rms_norm_eps"])
    if (v.get("rope_parameters") or {}).get("rope_theta") is not None:
        heads |= rope(v)
    # eps of the output norm is that of the code, not of the config.
    kinds = {"l": _gated_delta(v, allow_neg_eigval=v["linear_allow_neg_eigval"], norm_eps=1e-5), "a": heads}
    pattern = ["a" if kind == "full_attention" else "l" for kind in v["layer_types"]]
    mlp = {"d_mlp": v["intermediate_size"]}
    return {
        **language_model(v),
        "n_layer": len(pattern),
        "layer_pattern": pattern,
        "mixers": {name: kinds[name] for name in dict.fromkeys(pattern)},
        "mlp": mlp,
        "blocks": {"a": {"mlp": mlp, "norm": "post"}} if "a" in pattern else {},
    }


def _olmo_parts(v: Values, config: SeqlibConfig) -> Iterator[Part]:
    yield from top("model.embed_tokens.weight", "model.norm.weight")
    key, value = (v[f"linear_num_{k}_heads"] * v[f"linear_{k}_head_dim"] for k in ("key", "value"))
    qkv, convs = ("q_proj.weight", "k_proj.weight", "v_proj.weight"), ("q_conv1d", "k_conv1d", "v_conv1d")
    split = conv(*convs, shares=(key, key, value))
    third = -(-(2 * key + value) // 3)  # transformers saves them as equal parts, whatever belongs to whom
    equal = conv(*convs, shares=(third, third, 2 * key + value - 2 * third))
    gated_delta: Names = {
        **rows("qkv_proj.weight", qkv, shares=(key, key, value)),
        **split,
        **{f"{name}, in equal parts": part for name, part in equal.items()},
        **linear("a_proj", "b_proj", "g_proj", "o_proj"),
        "A_log": "A_log",
        "dt_bias": "dt_bias",
        "norm_weight": "o_norm.weight",
    }
    heads = {**ATTENTION, "q_norm.weight": "q_norm.weight", "k_norm.weight": "k_norm.weight"}
    layers: dict[str, Names] = {
        "l": {
            "norm.weight": "attention_layer_norm.weight",
            "mlp_norm.weight": "feedforward_layer_norm.weight",
            **within("mixer.", "linear_attn.", gated_delta),
        },
        "a": {
            # The second name is what transformers makes of it when it saves.
            "norm.weight": "post_attention_layernorm.weight|feedforward_layer_norm.weight",
            "mlp_norm.weight": "post_feedforward_layernorm.weight",
            **within("mixer.", "self_attn.", heads),
        },
    }
    for i, name in enumerate(config.backbone.layer_pattern):
        yield from layer(i, f"model.layers.{i}.", layers[name], within("mlp.", "mlp.", GLU))


FAMILIES = (
    ported(
        "qwen3_next",
        "qwen3_next",
        _qwen_config,
        _qwen_parts,
        known=LEGACY | {"full_attention_interval", "use_sliding_window", "rope_scaling", "sliding_window"},
        ignored=(r"^mtp\.",),
    ),
    ported(
        "olmo_hybrid",
        "olmo_hybrid",
        _olmo_config,
        _olmo_parts,
        known=LEGACY | {"fla_hybrid_attention_indices", "linear_use_gate"},
    ),
)
