"""Zamba2: Mamba-2, before some of which stands one of a few shared transformer blocks.

Source: transformers, models/zamba2; Zyphra/Zamba2. That code does not hold dt above time_step_min and stretches the
rotary base for long contexts; transformers' does the first in a pass over several tokens and not the second.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from seqlib.hf.configuration import SeqlibConfig
from seqlib.hf.families.base import Names, Part, Values, expect, layer, linear, only, ported, top, within
from seqlib.hf.families.common import ATTENTION, LEGACY, language_model
from seqlib.hf.families.mamba import MAMBA2

__all__ = ["FAMILIES"]

_OLD = {"lora_rank": "adapter_rank", "use_shared_attention_lora": "use_shared_attention_adapter"}
_DERIVED = {"attention_hidden_size", "attention_head_dim", "mamba_headdim", "kv_channels", "num_query_groups"}
_DERIVED |= {"hybrid_layer_ids", "layer_types", "chunk_size", "time_step_limit", *_OLD}


def _defaults(v: Values) -> dict[str, Any]:
    """transformers counts heads by n_mamba_heads alone; some files have only their width."""
    given = {_OLD.get(name, name): value for name, value in v.items()}
    if "mamba_headdim" in given and "n_mamba_heads" not in given:
        given["n_mamba_heads"] = given.get("mamba_expand", 2) * given["hidden_size"] // given["mamba_headdim"]
    known = {name: value for name, value in v.items() if name in _OLD.keys() | {"mamba_headdim"}}
    return known | _PORTED.defaults(given)


def _config(v: Values, match: str) -> dict[str, Any]:
    expect("zamba2", v, hidden_act="gelu")
    d_model, nheads = v["hidden_size"], v["num_attention_heads"]
    headdim, inner = 2 * d_model // nheads, v["mamba_expand"] * d_model
    pattern = ["h" if kind == "hybrid" else "m" for kind in v["layers_block_type"]]
    ssm = {
        "kind": "mamba2",
        "d_state": v["mamba_d_state"],
        "headdim": inner // v["n_mamba_heads"],
        "ngroups": v["mamba_ngroups"],
        "d_conv": v["mamba_d_conv"],
        "d_inner": inner,
        "conv_bias": v["use_conv_bias"],
        "bias": v["add_bias_linear"],
        "dt_limit_min": v["time_step_min"] if match == "transformers" else 0.0,
    }
    attention = {
        "nheads": nheads,
        "nheads_kv": v["num_key_value_heads"],
        "headdim": headdim,
        "rotary": v["use_mem_rope"],
    }
    attention["scale"] = (headdim / 2) ** -0.5
    if v["use_mem_rope"]:
        given = v.get("rope_parameters") or {}
        only("zamba2: rope_parameters", given, {"rope_type", "rope_theta"})
        theta = float(given.get("rope_theta", 1e4))
        stretched = v["use_long_context"] and match == "authors"
        attention["rope_theta"] = theta * 8 ** (headdim / (headdim - 2)) if stretched else theta
    names = dict.fromkeys(pattern)
    shared = {
        "attention": attention,
        "d_mlp": v["intermediate_size"],
        "bias": v["add_bias_linear"],
        "copies": v["num_mem_blocks"],
        "rank": v["adapter_rank"],
        "attention_adapters": v["use_shared_attention_adapter"],
    }
    return {
        **language_model(v),
        "n_layer": len(pattern),
        "layer_pattern": pattern,
        "mixers": dict.fromkeys(names, ssm),
        "blocks": {"h": {"aside": True}} if "h" in names else {},
        "aside": shared if "h" in names else None,
    }


def _parts(v: Values, config: SeqlibConfig) -> Iterator[Part]:
    yield from top("model.embed_tokens.weight", "model.final_layernorm.weight")
    plain: Names = {"norm.weight": "input_layernorm.weight", **within("mixer.", "mamba.", MAMBA2)}
    block: Names = {
        "norm.weight": "input_layernorm.weight",
        "mlp_norm.weight": "pre_ff_layernorm.weight",
        **within("attention.", "self_attn.", ATTENTION),
        **within("", "feed_forward.", linear("down_proj", in_proj="gate_up_proj")),
    }
    hybrids = [i for i, name in enumerate(config.backbone.layer_pattern) if name == "h"]
    copies = v["num_mem_blocks"]
    for n, i in enumerate(hybrids):
        # A block and all that its users add to it are stored with its first user.
        home = f"model.layers.{hybrids[n % copies]}.shared_transformer."
        if n < copies:
            yield from within(f"model.backbone.asides.{n}.", home, block).values()  # type: ignore[misc]
        use: dict[str, str | Part] = {}
        lists = {"mlp": "feed_forward.gate_up_proj_adapter_list"}
        lists |= {f"qkv.{j}": f"self_attn.linear_{kind}_adapter_list" for j, kind in enumerate("qkv")}
        for our, their in lists.items():
            use |= {f"{our}.a.weight": f"{their}.{n}.0.weight", f"{our}.b.weight": f"{their}.{n}.1.weight"}
        yield from within(f"model.backbone.layers.{i}.use.", home, use).values()  # type: ignore[misc]
    for i, name in enumerate(config.backbone.layer_pattern):
        if name == "h":
            yield from layer(i, f"model.layers.{i}.", {"use.out_proj.weight": "linear.weight"})
            yield from layer(i, f"model.layers.{i}.mamba_decoder.", plain)
        else:
            yield from layer(i, f"model.layers.{i}.", plain)


_PORTED = ported("zamba2", "zamba2", _config, _parts, known=LEGACY | _DERIVED)
FAMILIES = (dataclasses.replace(_PORTED, defaults=_defaults),)
