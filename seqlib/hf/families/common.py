"""What the hybrids in transformers have in common: attention, Mamba-2 in their fields, MLPs and experts."""

from __future__ import annotations

from typing import Any

from seqlib.errors import CheckpointMismatch
from seqlib.hf.families.base import Names, Part, Values, expect, ids, linear, only
from seqlib.hf.families.mamba import dt_limit

__all__ = ["ATTENTION", "GLU", "LEGACY", "attention", "experts", "language_model", "mamba2", "rope"]

ATTENTION: Names = linear("q_proj", "k_proj", "v_proj", "o_proj")
GLU: Names = linear("gate_proj", "up_proj", "down_proj")
LEGACY = frozenset(
    {"rope_theta", "rope_scaling", "partial_rotary_factor", "rope_parameters", "head_dim", "use_mamba_kernels"}
)
"""Fields that transformers' config classes read without naming them, or turn into others."""


def language_model(v: Values) -> dict[str, Any]:
    """What every config says in the same words."""
    return {
        "d_model": v["hidden_size"],
        "vocab_size": v["vocab_size"],
        "tie_word_embeddings": v["tie_word_embeddings"],
        **({"norm_eps": v["rms_norm_eps"]} if "rms_norm_eps" in v else {}),
        **ids(v),
    }


def attention(v: Values, **options: Any) -> dict[str, Any]:
    """An attention mixer without rotary positions; `options` are fields of `AttentionConfig`."""
    return {
        "kind": "attention",
        "nheads": v["num_attention_heads"],
        "nheads_kv": v["num_key_value_heads"],
        "headdim": v.get("head_dim") or v["hidden_size"] // v["num_attention_heads"],
        "bias": v.get("attention_bias", False),
        "rotary": False,
        **options,
    }


_ROPE = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings"}


def rope(v: Values, headdim: int | None = None) -> dict[str, Any]:
    """Rotary positions as fields of `AttentionConfig`; a `rotary_dim` goes before a factor."""
    given = v.get("rope_parameters") or {}
    only(f"{v['model_type']}: rope_parameters", given, _ROPE)
    kind = given.get("rope_type", "default")
    if kind not in ("default", "linear"):
        raise CheckpointMismatch(f"{v['model_type']}: rope_type {kind!r} is not supported; known: default, linear")
    fraction = given.get("partial_rotary_factor", 1.0)
    if v.get("rotary_dim") and headdim:
        fraction = v["rotary_dim"] / headdim
    scaling = given.get("factor") if kind == "linear" else None
    return {
        "rotary": True,
        "rope_theta": float(given["rope_theta"]),
        "rotary_fraction": fraction,
        "rope_scaling": scaling,
    }


def mamba2(v: Values, **options: Any) -> dict[str, Any]:
    """A Mamba-2 mixer from fields that begin with mamba_."""
    expect(v["model_type"], v, hidden_act=("silu", "swish"))
    inner = v["mamba_n_heads"] * v["mamba_d_head"]
    return {
        "kind": "mamba2",
        "d_state": v["mamba_d_state"],
        "headdim": v["mamba_d_head"],
        "ngroups": v["mamba_n_groups"],
        "d_conv": v["mamba_d_conv"],
        "d_inner": inner,
        "conv_bias": v["mamba_conv_bias"],
        "bias": v["mamba_proj_bias"],
        "norm_eps": v["rms_norm_eps"],
        **dt_limit(v.get("time_step_limit")),
        **options,
    }


def experts(
    count: int, gate: str | None = "gate_proj", up: str = "up_proj", down: str = "down_proj", prefix: str = "experts."
) -> Names:
    """The experts of a `MoE`, stored one by one; also as transformers holds them in memory."""
    into, out = ("in_weight",), ("out_weight",)
    parts = [name for name in (gate, up) if name is not None]
    stacked = "gate_up_proj" if gate is not None else "up_proj"
    return {
        "in_weight": Part(into, tuple(f"{prefix}{e}.{name}.weight" for e in range(count) for name in parts)),
        "out_weight": Part(out, tuple(f"{prefix}{e}.{down}.weight" for e in range(count))),
        "in_weight, stacked": Part(into, (f"{prefix}{stacked}",)),
        "out_weight, stacked": Part(out, (f"{prefix}down_proj",)),
    }
