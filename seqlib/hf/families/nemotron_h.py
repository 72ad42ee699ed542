"""Nemotron-H: every layer is one of Mamba-2, attention, an MLP or experts.

Source: transformers, models/nemotron_h; NVIDIA 2025 (arXiv 2504.03624) and its code on the Hub. That code does not
hold dt above time_step_min, transformers' does so in a pass over several tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from seqlib.hf.configuration import SeqlibConfig
from seqlib.hf.families.base import Part, Values, expect, layer, linear, ported, top, within
from seqlib.hf.families.common import ATTENTION, LEGACY, attention, experts, language_model
from seqlib.hf.families.mamba import MAMBA2, dt_limit

__all__ = ["FAMILIES"]

_NAMES = {"linear_attention": "m", "full_attention": "a", "mlp": "f", "moe": "e"}
_OLD = {"hybrid_override_pattern", "mtp_hybrid_override_pattern", "layer_types", "num_hidden_layers"}
_OLD |= {f"mamba_{name}" for name in ("n_groups", "d_conv", "expand", "dt_min", "dt_max", "dt_limit", "dt_init_floor")}
_OLD |= {"mamba_conv_bias", "mamba_chunk_size", "rms_norm_eps", "norm_eps", "attention_head_dim", "n_routed_experts"}


def _config(v: Values, match: str) -> dict[str, Any]:
    expect("nemotron_h", v, mamba_hidden_act=("silu", "swish"), sliding_window=None)
    limit = dt_limit(v["time_step_limit"])
    if match == "transformers":
        limit = {"dt_limit_min": v["time_step_min"], "dt_limit_max": None}
    ssm = {
        "kind": "mamba2",
        "d_state": v["ssm_state_size"],
        "headdim": v["mamba_head_dim"],
        "ngroups": v["n_groups"],
        "d_conv": v["conv_kernel"],
        "d_inner": v["mamba_num_heads"] * v["mamba_head_dim"],
        "conv_bias": v["use_conv_bias"],
        "bias": v["use_bias"],
        "norm_eps": v["layer_norm_epsilon"],
        **limit,
    }
    dense = {
        "d_mlp": v["intermediate_size"],
        "gated": False,
        "activation": v["mlp_hidden_act"],
        "bias": v["mlp_bias"],
    }
    routed = {
        "d_mlp": v["moe_intermediate_size"],
        "gated": False,
        "activation": v["mlp_hidden_act"],
        "nexperts": v["n_routed_experts"],
        "top_k": v["num_experts_per_tok"],
        "score": "sigmoid",
        "normalize": v["norm_topk_prob"],
        "scale": v["routed_scaling_factor"],
        "choice_bias": True,
        "ngroups": v["n_group"],
        "top_groups": v["topk_group"],
        "d_shared": v["moe_shared_expert_intermediate_size"],
        "d_latent": v["moe_latent_size"],
    }
    pattern = [_NAMES[name] for name in v["layers_block_type"]]
    kinds = {
        "m": ssm,
        "a": attention(v),
        "f": {"kind": "channel", "mlp": dense},
        "e": {"kind": "channel", "mlp": routed},
    }
    return {
        **language_model(v),
        "n_layer": len(pattern),
        "layer_pattern": pattern,
        "mixers": {name: kinds[name] for name in dict.fromkeys(pattern)},
        "norm_eps": v["layer_norm_epsilon"],
    }


def _parts(v: Values, config: SeqlibConfig) -> Iterator[Part]:
    yield from top("backbone.embeddings.weight|model.embeddings.weight", "backbone.norm_f.weight|model.norm_f.weight")
    mlp = linear("up_proj", "down_proj")
    routed = {
        "router.weight": "gate.weight",
        "choice_bias": "gate.e_score_correction_bias",
        "latent_in.weight": "fc1_latent_proj.weight",
        "latent_out.weight": "fc2_latent_proj.weight",
        **experts(v["n_routed_experts"], gate=None),
        **within("shared.", "shared_experts.", mlp),
    }
    mixers = {
        "m": within("mixer.", "mixer.", MAMBA2),
        "a": within("mixer.", "mixer.", ATTENTION),
        "f": within("mixer.mlp.", "mixer.", mlp),
        "e": within("mixer.mlp.", "mixer.", routed),
    }
    for i, name in enumerate(config.backbone.layer_pattern):
        yield from layer(i, f"backbone.layers.{i}.", {"norm.weight": "norm.weight"}, mixers[name])


FAMILIES = (ported("nemotron_h", "nemotron_h", _config, _parts, known=LEGACY | frozenset(_OLD), ignored=(r"^mtp\.",)),)
