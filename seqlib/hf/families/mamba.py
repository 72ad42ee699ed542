"""Mamba and Mamba-2: the originals of state-spaces, Codestral, and transformers' mamba, mamba2 and falcon_mamba.

Source: state-spaces/mamba, models/config_mamba.py, models/mixer_seq_simple.py, modules/; transformers, models/mamba,
mamba2 and falcon_mamba; mistralai, params.json of Mamba-Codestral.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from seqlib.errors import CheckpointMismatch
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
    ported,
    rows,
    top,
    within,
)

__all__ = ["FAMILIES"]

MAMBA: Names = {
    **linear("in_proj", "x_proj", "out_proj"),
    **conv("conv1d"),
    "dt_proj.weight": "dt_proj.weight",
    "dt_bias": "dt_proj.bias",
    "A_log": "A_log",
    "D": "D",
}
MAMBA2: Names = {
    **linear("in_proj", "out_proj"),
    **conv("conv1d"),
    "dt_bias": "dt_bias",
    "A_log": "A_log",
    "D": Part(("D",), ("D",), tail=()),
    "norm_weight": "norm.weight",
}
_TOP = ("backbone.embedding.weight|backbone.embeddings.weight", "backbone.norm_f.weight")
_TOP_HF = ("backbone.embeddings.weight|backbone.embedding.weight", "backbone.norm_f.weight")


def dt_limit(limit: Any) -> dict[str, float | None]:
    """Our limits from a pair that may hold infinity, also as JSON without infinity writes it."""
    low, high = (float(v["__float__"] if isinstance(v, dict) else v) for v in limit or (0.0, math.inf))
    return {"dt_limit_min": low, "dt_limit_max": None if math.isinf(high) else high}


def _limit(mixer: Any) -> list[float]:
    return [mixer.dt_limit_min, math.inf if mixer.dt_limit_max is None else mixer.dt_limit_max]


def _hf_config(v: Values, match: str) -> dict[str, Any]:
    expect(v["model_type"], v, hidden_act=("silu", "swish"))
    mixer = {
        "d_state": v["state_size"],
        "d_conv": v["conv_kernel"],
        "expand": v["expand"],
        "conv_bias": v["use_conv_bias"],
        "bias": v["use_bias"],
    }
    if v["model_type"] == "mamba2":
        mixer |= {
            "kind": "mamba2",
            "headdim": v["head_dim"],
            "ngroups": v["n_groups"],
            **dt_limit(v["time_step_limit"]),
        }
    else:
        rank = v["time_step_rank"]
        mixer |= {"kind": "mamba", "dt_rank": None if rank == "auto" else rank}
    if v["model_type"] == "falcon_mamba":
        mixer |= {"inner_norm": "plain", "inner_norm_eps": v["mixer_rms_eps"]}
    return {
        "d_model": v["hidden_size"],
        "n_layer": v["num_hidden_layers"],
        "vocab_size": v["vocab_size"],
        "mixer": mixer,
        "norm_eps": v["layer_norm_epsilon"],
        "residual_in_fp32": v["residual_in_fp32"],
        "tie_word_embeddings": v["tie_word_embeddings"],
        **ids(v),
    }


def _hf_parts(v: Values, config: SeqlibConfig) -> Iterator[Part]:
    yield from top(*_TOP_HF)
    names = MAMBA2 if v["model_type"] == "mamba2" else MAMBA
    for i in range(config.n_layer):
        yield from layer(i, f"backbone.layers.{i}.", {"norm.weight": "norm.weight"}, within("mixer.", "mixer.", names))


def _hf_write(kind: str, config: SeqlibConfig) -> dict[str, Any]:
    """transformers' config of a stack of one Mamba."""
    mixer = one_mixer(config, kind)
    values = {
        "architectures": ["MambaForCausalLM" if kind == "mamba" else "Mamba2ForCausalLM"],
        "model_type": kind,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layer,
        "vocab_size": config.vocab_size,
        "state_size": mixer.d_state,
        "conv_kernel": mixer.d_conv,
        "expand": mixer.expand,
        "use_conv_bias": mixer.conv_bias,
        "use_bias": mixer.bias,
        "layer_norm_epsilon": config.norm_eps,
        "residual_in_fp32": config.residual_in_fp32,
        "tie_word_embeddings": config.tie_word_embeddings,
        "hidden_act": "silu",
        **ids(config.to_dict()),
    }
    if kind == "mamba":
        return values | {"time_step_rank": mixer.dt_rank or "auto"}
    inner = mixer.d_inner or mixer.expand * config.d_model
    return values | {
        "head_dim": mixer.headdim,
        "num_heads": inner // mixer.headdim,
        "n_groups": mixer.ngroups,
        "time_step_limit": _limit(mixer),
    }


def one_mixer(config: SeqlibConfig, kind: str) -> Any:
    """The config of the mixer of a stack that has `kind` everywhere."""
    mixers = config.backbone.mixers
    if len(mixers) != 1 or next(iter(mixers.values())).kind != kind:
        found = ", ".join(sorted({m.kind for m in mixers.values()}))
        raise CheckpointMismatch(f"this layout has {kind} in every layer, the model has {found}")
    return next(iter(mixers.values()))


# The originals: fields of ssm_cfg by ours, with what their code takes if they are absent.
_SSM = {"d_state": "d_state", "d_conv": "d_conv", "expand": "expand", "conv_bias": "conv_bias", "bias": "bias"}
_SSM |= {"dt_min": "dt_min", "dt_max": "dt_max", "dt_init_floor": "dt_floor"}
_SSM1 = _SSM | {"dt_rank": "dt_rank", "dt_scale": "dt_scale", "dt_init": "dt_init"}
_SSM2 = _SSM | {
    "headdim": "headdim",
    "ngroups": "ngroups",
    "D_has_hdim": "D_per_channel",
    "rmsnorm": "norm",
    "norm_before_gate": "norm_before_gate",
    "conv_init": "conv_init",
}
_RUNTIME = {"layer", "chunk_size", "use_mem_eff_path", "use_fast_path", "sequence_parallel"}
_ATTENTION = {"num_heads", "num_heads_kv", "head_dim", "rotary_emb_dim", "rotary_emb_base", "rotary_emb_interleaved"}
_ATTENTION |= {"qkv_proj_bias", "out_proj_bias", "softmax_scale", "causal", "d_conv", "mlp_dim"}
_ORIGINAL = {
    "d_model": 2560,
    "d_intermediate": 0,
    "n_layer": 64,
    "vocab_size": 50277,
    "ssm_cfg": {},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
    "tie_embeddings": True,
}


def _original_config(v: Values, match: str) -> dict[str, Any]:
    expect("state-spaces", v, rms_norm=True)
    multiple = v["pad_vocab_size_multiple"]
    mixers = {"m": _original_mixer(v["ssm_cfg"] or {})}
    if v["attn_layer_idx"]:
        mixers["a"] = _original_attention(v["attn_cfg"], v["d_model"])
    width = -(-v["d_intermediate"] // 128) * 128
    return {
        "d_model": v["d_model"],
        "n_layer": v["n_layer"],
        "vocab_size": -(-v["vocab_size"] // multiple) * multiple,
        "mixers": mixers,
        "layer_pattern": ["a" if i in v["attn_layer_idx"] else "m" for i in range(v["n_layer"])],
        "mlp": {"d_mlp": width} if width else None,
        "residual_in_fp32": v["residual_in_fp32"],
        "tie_word_embeddings": v["tie_embeddings"],
    }


def _original_mixer(given: Values) -> dict[str, Any]:
    layer_name = given.get("layer", "Mamba1")
    if layer_name not in ("Mamba1", "Mamba2"):
        raise CheckpointMismatch(f"ssm_cfg has layer={layer_name!r}; known: Mamba1, Mamba2")
    known = _SSM1 if layer_name == "Mamba1" else _SSM2
    made: dict[str, Any] = {"kind": "mamba" if layer_name == "Mamba1" else "mamba2"}
    for name, value in given.items():
        if name in known:
            made[known[name]] = None if value == "auto" else value
        elif name == "dt_limit" and layer_name == "Mamba2":
            made |= dt_limit(value)
        elif name == "A_init_range" and layer_name == "Mamba2":
            made["A_min"], made["A_max"] = (float(x) for x in value)
        elif name not in _RUNTIME:
            raise CheckpointMismatch(
                f"ssm_cfg has {name}={value!r}, which is not supported; known: {', '.join(sorted(known.keys()))}"
            )
    return made


def _original_attention(given: Values, d_model: int) -> dict[str, Any]:
    only("attn_cfg", given, _ATTENTION)
    expect("attn_cfg", given, causal=True, mlp_dim=0)
    headdim = given.get("head_dim") or d_model // given["num_heads"]
    rotated, d_conv = given.get("rotary_emb_dim", 0), given.get("d_conv", 0)
    return {
        "kind": "conv_attention" if d_conv else "attention",
        **({"d_conv": d_conv} if d_conv else {}),
        "nheads": given["num_heads"],
        "nheads_kv": given.get("num_heads_kv"),
        "headdim": headdim,
        "scale": given.get("softmax_scale"),
        "bias": given.get("qkv_proj_bias", True),
        "out_bias": given.get("out_proj_bias", True),
        "rotary": rotated > 0,
        "rotary_fraction": rotated / headdim if rotated else 1.0,
        "rope_theta": given.get("rotary_emb_base", 10000.0),
        "rotary_interleaved": given.get("rotary_emb_interleaved", False),
    }


def _original_parts(v: Values, config: SeqlibConfig) -> Iterator[Part]:
    yield from top(*_TOP)
    around = {
        "norm.weight": "norm.weight",
        "mlp_norm.weight": "norm2.weight",
        **rows(("mlp.up_proj.weight", "mlp.gate_proj.weight"), "mlp.fc1.weight"),
        "mlp.down_proj.weight": "mlp.fc2.weight",
    }
    attention: Names = {
        **rows(("q_proj.weight", "k_proj.weight", "v_proj.weight"), "in_proj.weight"),
        **rows(("q_proj.bias", "k_proj.bias", "v_proj.bias"), "in_proj.bias"),
        **conv("conv1d"),
        **linear(o_proj="out_proj"),
    }
    by_kind = {"mamba": MAMBA, "mamba2": MAMBA2, "attention": attention, "conv_attention": attention}
    for i, name in enumerate(config.backbone.layer_pattern):
        mixer = by_kind[config.backbone.mixers[name].kind]
        yield from layer(i, f"backbone.layers.{i}.", around, within("mixer.", "mixer.", mixer))


def _original_write(config: SeqlibConfig) -> dict[str, Any]:
    kind = next(iter(config.backbone.mixers.values())).kind
    mixer = one_mixer(config, kind if kind == "mamba2" else "mamba")
    known = _SSM1 if mixer.kind == "mamba" else _SSM2
    changed = mixer.to_dict()
    ssm: dict[str, Any] = {"layer": "Mamba1" if mixer.kind == "mamba" else "Mamba2"}
    ssm |= {name: changed[ours] for name, ours in known.items() if ours in changed}
    if mixer.kind == "mamba2":
        ssm["dt_limit"] = _limit(mixer)
    width = 0 if config.backbone.mlp is None else config.backbone.mlp.width(config.d_model)
    return _ORIGINAL | {
        "d_model": config.d_model,
        "n_layer": config.n_layer,
        "vocab_size": config.vocab_size,
        "d_intermediate": width,
        "ssm_cfg": ssm,
        "residual_in_fp32": config.residual_in_fp32,
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": config.tie_word_embeddings,
    }


_CODESTRAL = {
    "n_groups": 8,
    "tie_embeddings": False,
    "residual_in_fp32": True,
    "rms_norm": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 1,
}


def _codestral_config(v: Values, match: str) -> dict[str, Any]:
    names = {"d_model": v["dim"], "n_layer": v["n_layers"], "ssm_cfg": {"layer": "Mamba2", "ngroups": v["n_groups"]}}
    return _original_config(_ORIGINAL | {k: v[k] for k in v if k in _ORIGINAL} | names, match)


def _codestral_parts(v: Values, config: SeqlibConfig) -> Iterator[Part]:
    yield from top("model.backbone.embedding.weight", "model.backbone.norm_f.weight", "model.lm_head.weight")
    for i in range(config.n_layer):
        mixer = within("mixer.", "mixer.", MAMBA2)
        yield from layer(i, f"model.backbone.layers.{i}.", {"norm.weight": "norm.weight"}, mixer)


def _hf(name: str, kind: str, **options: Any) -> Family:
    # Early conversions carry the original's fields as well.
    return ported(name, kind, _hf_config, _hf_parts, known=frozenset(_ORIGINAL) | {"intermediate_size"}, **options)


FAMILIES = (
    _hf("mamba-hf", "mamba", write=lambda config: _hf_write("mamba", config)),
    _hf("mamba2-hf", "mamba2", write=lambda config: _hf_write("mamba2", config)),
    _hf("falcon_mamba", "falcon_mamba"),
    Family(
        "state-spaces",
        _original_config,
        _original_parts,
        matches=lambda v: "model_type" not in v and {"d_model", "n_layer"} <= v.keys(),
        defaults=defaulted(_ORIGINAL),
        write=_original_write,
        stores_tied_head=True,
        weights_file="pytorch_model.bin",
    ),
    Family(
        "codestral",
        _codestral_config,
        _codestral_parts,
        matches=lambda v: {"dim", "n_layers"} <= v.keys(),
        defaults=defaulted(_CODESTRAL, ("dim", "n_layers", "vocab_size")),
        weights_file="consolidated.safetensors",
        config_file="params.json",
    ),
)
