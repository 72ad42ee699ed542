"""Models of flash-linear-attention: gla, retnet, delta_net and gated_deltanet.

Source: fla-org/flash-linear-attention, fla/models/*/configuration_*.py and fla/layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from seqlib.hf.configuration import SeqlibConfig
from seqlib.hf.families.base import (
    Family,
    Names,
    Part,
    Values,
    conv,
    defaulted,
    expect,
    ids,
    layer,
    linear,
    only,
    rows,
    top,
    within,
)
from seqlib.hf.families.common import ATTENTION, GLU

__all__ = ["FAMILIES"]

_COMMON = {
    "hidden_size": 2048,
    "hidden_ratio": 4,
    "intermediate_size": None,
    "num_hidden_layers": 24,
    "hidden_act": "swish",
    "norm_eps": 1e-6,
    "attn": None,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
_RUNTIME = {"attn_mode", "fuse_norm", "fuse_swiglu", "fuse_cross_entropy", "fuse_linear_cross_entropy", "use_l2warp"}
_RUNTIME |= {"clamp_min", "use_gk", "use_gv", "elementwise_affine", "feature_map", "use_output_norm", "conv_bias"}
_RUNTIME |= {"attnres_block_size", "max_position_embeddings"}
_ATTENTION = {"layers", "num_heads", "num_kv_heads", "qkv_bias", "qk_norm", "window_size", "rope_theta"}
# Options that would change the maths; what is not named in a config has the first of these values.
_FIXED: dict[str, dict[str, Any]] = {
    "gla": {"use_short_conv": False, "use_output_gate": True, "num_kv_heads": None, "clamp_min": None, "use_gk": True},
    "retnet": {"use_short_conv": False, "use_output_gate": True, "num_kv_heads": None, "feature_map": None},
    "delta_net": {"use_short_conv": True, "use_beta": True, "qk_norm": "l2", "qk_activation": "silu"},
    "gated_deltanet": {"use_short_conv": True, "use_gate": True},
}
_FIXED["gla"] |= {"feature_map": None, "use_gv": False}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gla": {"num_heads": 4, "expand_k": 0.5, "expand_v": 1.0, "conv_size": 4},
    "retnet": {"num_heads": 8, "expand_k": 1.0, "expand_v": 2.0, "hidden_ratio": 2, "conv_size": 4},
    "delta_net": {"num_heads": 16, "expand_k": 1.0, "expand_v": 1.0, "conv_size": 4, "use_gate": False},
    "gated_deltanet": {"num_heads": 6, "head_dim": 256, "expand_v": 2.0, "conv_size": 4, "num_hidden_layers": 21},
}
_DEFAULTS["delta_net"] |= {"allow_neg_eigval": False}
_DEFAULTS["gated_deltanet"] |= {"allow_neg_eigval": False, "num_v_heads": None}


def _mixer(v: Values) -> dict[str, Any]:
    kind = v["model_type"]
    same = {"nheads": v["num_heads"], "expand_v": v["expand_v"], "norm_eps": v["norm_eps"]}
    if kind in ("gla", "retnet"):
        return {"kind": kind, **same, "expand_k": v["expand_k"]}
    same |= {"d_conv": v["conv_size"], "allow_neg_eigval": v["allow_neg_eigval"]}
    if kind == "gated_deltanet":
        return {"kind": kind, **same, "headdim": v["head_dim"], "nheads_v": v["num_v_heads"]}
    headdim = int(v["hidden_size"] * v["expand_k"]) // v["num_heads"]
    return {
        "kind": "deltanet",
        **same,
        "headdim": headdim,
        "expand_v": v["expand_v"] / v["expand_k"],
        "gate": v["use_gate"],
    }


def _attention(v: Values) -> dict[str, Any]:
    given = v["attn"]
    only(f"{v['model_type']}: attn", given, _ATTENTION)
    expect(v["model_type"], given, qk_norm=False)
    return {
        "kind": "attention",
        "nheads": given["num_heads"],
        "nheads_kv": given.get("num_kv_heads"),
        "bias": given.get("qkv_bias", False),
        "out_bias": False,
        "window": given.get("window_size"),
        "rope_theta": given.get("rope_theta", 10000.0),
    }


def _config(v: Values, match: str) -> dict[str, Any]:
    kind = v["model_type"]
    heads = v["num_heads"]
    expect(
        kind,
        v,
        hidden_act=("swish", "silu"),
        elementwise_affine=(True, None),
        conv_bias=False,
        attnres_block_size=None,
        use_output_norm=True,
    )
    expect(
        kind, v, **{name: (value, heads) if name == "num_kv_heads" else value for name, value in _FIXED[kind].items()}
    )
    at = set(v["attn"]["layers"]) if v["attn"] else set()
    pattern = ["a" if i in at else "m" for i in range(v["num_hidden_layers"])]
    made: dict[str, Callable[[Values], dict[str, Any]]] = {"m": _mixer, "a": _attention}
    return {
        "d_model": v["hidden_size"],
        "n_layer": len(pattern),
        "vocab_size": v["vocab_size"],
        "layer_pattern": pattern,
        "mixers": {name: made[name](v) for name in dict.fromkeys(pattern)},
        "mlp": {"d_mlp": v["intermediate_size"] or -(-int(v["hidden_size"] * v["hidden_ratio"] * 2 / 3) // 256) * 256},
        "norm_eps": v["norm_eps"],
        "tie_word_embeddings": v["tie_word_embeddings"],
        **ids(v),
    }


def _parts(v: Values, config: SeqlibConfig) -> Iterator[Part]:
    yield from top("model.embeddings.weight", "model.norm.weight")
    around: Names = {
        "norm.weight": "attn_norm.weight",
        "mlp_norm.weight": "mlp_norm.weight",
        **within("mlp.", "mlp.", GLU),
        # Until February 2025 gate and up were one.
        "fused": Part(("mlp.gate_proj.weight", "mlp.up_proj.weight"), ("mlp.gate_proj.weight",)),
    }
    mixers = {"a": ATTENTION, "m": _names(v, config)}
    for i, name in enumerate(config.backbone.layer_pattern):
        yield from layer(i, f"model.layers.{i}.", around, within("mixer.", "attn.", mixers[name]))


def _names(v: Values, config: SeqlibConfig) -> Names:
    kind = v["model_type"]
    gated_norm = {"norm_weight": "g_norm_swish_gate.weight|g_norm.weight"}
    if kind == "retnet":
        return {**linear("q_proj", "k_proj", "v_proj", "g_proj", "o_proj"), **gated_norm}
    if kind == "gla":
        low_rank = linear(gk_a_proj="gk_proj.0", gk_b_proj="gk_proj.1")
        return {**linear("q_proj", "k_proj", "v_proj", "g_proj", "o_proj"), **low_rank, **gated_norm}
    if kind == "delta_net":
        key, value = (int(v["hidden_size"] * v[f"expand_{k}"]) for k in "kv")
    else:
        key = v["num_heads"] * v["head_dim"]
        value = int((v["num_v_heads"] or v["num_heads"]) * v["head_dim"] * v["expand_v"])
    shares = (key, key, value)
    return {
        **rows("qkv_proj.weight", ("q_proj.weight", "k_proj.weight", "v_proj.weight"), shares=shares),
        **conv("q_conv1d", "k_conv1d", "v_conv1d", shares=shares),
        **linear("a_proj", "b_proj", "g_proj", "o_proj"),
        "A_log": "A_log",
        "dt_bias": "dt_bias",
        "norm_weight": "o_norm.weight",
    }


def _family(kind: str) -> Family:
    return Family(
        f"fla-{kind}",
        _config,
        _parts,
        matches=lambda v: v.get("model_type") == kind,
        defaults=defaulted(_COMMON | _DEFAULTS[kind] | _FIXED[kind], _RUNTIME),
        known=frozenset(_RUNTIME),
        ignored=(r"\.attn\.D$",) if kind == "gated_deltanet" else (),
    )


FAMILIES = tuple(_family(kind) for kind in _DEFAULTS)
