"""Based: gated short convolutions, Taylor linear attention and sliding windows.

Source: HazyResearch/based, based/models/gpt.py, block.py and mixers/, train/configs/experiment/reference. A window of
256 in its configs reaches 128 tokens back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from seqlib.errors import CheckpointMismatch
from seqlib.hf.configuration import SeqlibConfig
from seqlib.hf.families.base import (
    Family,
    Names,
    Part,
    Values,
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

__all__ = ["FAMILIES"]

_DEFAULTS = {
    "vocab_size": 50257,
    "n_embd": 1024,
    "n_layer": 27,
    "n_head": 16,
    "n_inner": None,
    "layer_norm_epsilon": 1e-5,
    "residual_in_fp32": False,
    "activation_function": "swiglu",
    "rotary_emb_fraction": 0.0,
    "rotary_emb_base": 10000.0,
    "rotary_emb_interleaved": False,
    "qkv_proj_bias": True,
    "out_proj_bias": True,
    "mlp_fc1_bias": True,
    "mlp_fc2_bias": True,
    "pad_vocab_size_multiple": 1,
    "tie_word_embeddings": True,
    "mixer": None,
    "alt_mixer": None,
    "alt_mixer_2": None,
    "alt_mixer_layers": None,
    "alt_mixer_2_layers": None,
}
_RUNTIME = {"special_initializer", "fused_mlp", "fused_bias_fc", "use_flash_attn", "fused_dropout_add_ln", "_target_"}
_RUNTIME |= {"attn_pdrop", "embd_pdrop", "resid_pdrop", "reorder_and_upcast_attn", "n_positions", "n_ctx"}
_RUNTIME |= {"rms_norm", "prenorm", "scale_attn_by_inverse_layer_idx", "scale_attn_weights", "mlp_type", "ff_mult"}
_RUNTIME |= {"max_position_embeddings", "summary_activation", "summary_first_dropout", "summary_proj_to_labels"}
_RUNTIME |= {"summary_type", "summary_use_proj", "add_cross_attention", "is_decoder", "n_head_kv"}
_RUNTIME |= {"lm_head_bias", "conv_bias", "prefixed"}  # the last two are what `_look` finds
_CONV, _LINEAR, _WINDOW = "BaseConv", "LinearAttention", "SlidingAttention"


def _config(v: Values, match: str) -> dict[str, Any]:
    expect(
        "based", v, rms_norm=True, prenorm=True, activation_function="swiglu", mlp_type="base", lm_head_bias=False,
        max_position_embeddings=0, scale_attn_by_inverse_layer_idx=False, scale_attn_weights=True, n_head_kv=None,
        mlp_fc2_bias=v["mlp_fc1_bias"],
    )  # fmt: skip
    pattern = [_at(v, i) for i in range(v["n_layer"])]
    made = {name: _mixer(v, v[name] or {}) for name in dict.fromkeys(pattern)}
    multiple = v["pad_vocab_size_multiple"]
    width = v["n_inner"] or int(8 * v["n_embd"] / 3)
    return {
        "d_model": v["n_embd"],
        "n_layer": v["n_layer"],
        "vocab_size": -(-v["vocab_size"] // multiple) * multiple,
        "layer_pattern": pattern,
        "mixers": made,
        "mlp": {"d_mlp": -(-width // 256) * 256, "bias": v["mlp_fc1_bias"]},
        "norm_eps": v["layer_norm_epsilon"],
        "residual_in_fp32": v["residual_in_fp32"],
        "tie_word_embeddings": v["tie_word_embeddings"],
        **{name: value for name, value in ids(v).items() if name != "max_position_embeddings"},
    }


def _at(v: Values, index: int) -> str:
    if index in (v["alt_mixer_2_layers"] or ()):
        return "alt_mixer_2"
    return "alt_mixer" if index in (v["alt_mixer_layers"] or ()) else "mixer"


def _mixer(v: Values, given: Values) -> dict[str, Any]:
    kind = given.get("_target_", "").rpartition(".")[2]
    if kind in _FIELDS:
        only(f"based: mixer {kind}", given, _FIELDS[kind] | _EVERY_MIXER)
    if kind == _CONV:
        inner = given.get("expand_proj", 2)
        if inner % 2:
            raise CheckpointMismatch(f"based: expand_proj must be even, got {inner}")
        return {
            "kind": "gated_conv",
            "d_conv": given.get("kernel_size", 3),
            "expand": inner // 2,
            "bias": given.get("use_bias", True),
            "conv_bias": v["conv_bias"],
        }
    if kind == _LINEAR:
        features = given.get("feature_map", {})
        only("based: feature_map", features, {"_target_", "input_dim"})
        expect("based", features, _target_=f"{_TARGET}.TaylorExp")
        return {"kind": "based", "nheads": given.get("num_heads", 16), "d_feature": given.get("feature_dim", 16)}
    if kind != _WINDOW:
        raise CheckpointMismatch(f"based: mixer {kind!r} is not supported; known: {_CONV}, {_LINEAR}, {_WINDOW}")
    fraction = v["rotary_emb_fraction"]
    return {
        "kind": "sliding_attention",
        "nheads": v["n_head"],
        "window": given.get("window_size", 128) // 2 + 1,
        "bias": v["qkv_proj_bias"],
        "out_bias": v["out_proj_bias"],
        "rotary": fraction > 0,
        "rotary_fraction": fraction or 1.0,
        "rope_theta": v["rotary_emb_base"],
        "rotary_interleaved": v["rotary_emb_interleaved"],
    }


# Fields of the mixers' own configs; those of every mixer decide nothing here.
_EVERY_MIXER = {"_target_", "layer_idx", "l_max", "use_cuda"}
_FIELDS = {
    _CONV: {"kernel_size", "use_bias", "expand_proj"},
    _LINEAR: {"num_heads", "feature_dim", "feature_map", "parallel_implementation"},
    _WINDOW: {"window_size"},
}
_TARGET = "based.models.mixers.linear_attention"
_NAMES: dict[str, Names] = {
    "gated_conv": {
        **linear("in_proj", "out_proj"),
        "conv1d.weight": Part(("conv1d.weight",), ("conv.conv.weight|conv1.conv.weight",), tail=(1, -1)),
        "conv1d.bias": "conv.conv.bias|conv1.conv.bias",
    },
    "based": linear(q_proj="proj_q", k_proj="proj_k", v_proj="proj_v", o_proj="out_proj"),
    "sliding_attention": {
        **rows(("q_proj.weight", "k_proj.weight", "v_proj.weight"), "Wqkv.weight"),
        **rows(("q_proj.bias", "k_proj.bias", "v_proj.bias"), "Wqkv.bias"),
        **linear(o_proj="out_proj"),
    },
}


def _parts(v: Values, config: SeqlibConfig) -> Iterator[Part]:
    root = "model." if v["prefixed"] else ""
    base = f"{root}transformer."
    yield from top(f"{base}embeddings.word_embeddings.weight", f"{base}ln_f.weight", f"{root}lm_head.weight")
    around: Names = {
        "norm.weight": "norm1.weight",
        "mlp_norm.weight": "norm2.weight",
        **rows(("mlp.up_proj.weight", "mlp.gate_proj.weight"), "mlp.fc1.weight"),
        **rows(("mlp.up_proj.bias", "mlp.gate_proj.bias"), "mlp.fc1.bias"),
        **linear(**{"mlp.down_proj": "mlp.fc2"}),
    }
    for i, name in enumerate(config.backbone.layer_pattern):
        mixer = _NAMES[config.backbone.mixers[name].kind]
        yield from layer(i, f"{base}layers.{i}.", around, within("mixer.", "mixer.", mixer))


def _look(names: Iterable[str]) -> dict[str, Any]:
    """Whether convolutions have biases depended on the kernel that was at hand, the prefix on who saved."""
    listed = list(names)
    return {
        "conv_bias": any(name.endswith(("conv.conv.bias", "conv1.conv.bias")) for name in listed),
        "prefixed": any(name.startswith("model.transformer.") for name in listed),
    }


FAMILIES = (
    Family(
        "based",
        _config,
        _parts,
        matches=lambda v: isinstance(v.get("mixer"), dict) and "n_embd" in v,
        defaults=defaulted(_DEFAULTS, _RUNTIME),
        known=frozenset(_RUNTIME),
        ignored=(r"metrics\.", r"feature_map\.tril_indices$"),
        look=_look,
        stores_tied_head=True,
        weights_file="pytorch_model.bin",
    ),
)
