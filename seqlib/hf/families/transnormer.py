"""TransNormerLLM: lightning attention, LRPE in the first layer, gated MLPs without activation, norms without weights.

Its tokenizer is BaiChuan's SentencePiece model with remote code; the 15B model has tiktoken.

Source: OpenNLPLab/TransNormerLLM, modeling_transnormer.py and configuration_transnormer.py; Qin et al. 2023 (arXiv
2307.14995).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from seqlib.errors import CheckpointMismatch
from seqlib.hf.configuration import SeqlibConfig
from seqlib.hf.families.base import Family, Names, Part, Values, defaulted, expect, ids, layer, linear, top, within

__all__ = ["FAMILIES"]

_DEFAULTS = {
    "vocab_size": 64000,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_embed_dim": 1024,
    "decoder_layers": 24,
    "decoder_attention_heads": 8,
    "no_scale_embedding": False,
    "norm_type": "simplermsnorm",
    "linear_use_lrpe_list": [],
    "hidden_dim": 1024,
    "linear_act_fun": "silu",
    "glu_dim": 2816,
    "bias": False,
    "tie_word_embeddings": True,
}
_RUNTIME = {"init_std", "add_bos_token", "causal", "glu_act", "use_triton", "hidden_size", "num_hidden_layers"}
_EPS = 1e-6


def _config(v: Values, match: str) -> dict[str, Any]:
    expect("transnormer", v, norm_type="simplermsnorm", linear_act_fun="silu", causal=True, glu_act="none")
    d_model, n_layer = v["decoder_embed_dim"], v["decoder_layers"]
    # The released code reads an absent list as no list at all, from a field that does not exist.
    lrpe = v["linear_use_lrpe_list"] or [0] * n_layer
    if len(lrpe) != n_layer:
        raise CheckpointMismatch(f"linear_use_lrpe_list has {len(lrpe)} entries for {n_layer} layers")
    heads = v["decoder_attention_heads"]
    mixer = {
        "kind": "lightning",
        "nheads": heads,
        "headdim": v["hidden_dim"] // heads,
        "bias": v["bias"],
        "norm_eps": _EPS,
    }
    pattern = ["r" if use else "l" for use in lrpe]
    kinds = {"l": mixer, "r": {**mixer, "lrpe": True}}
    return {
        "d_model": d_model,
        "n_layer": n_layer,
        "vocab_size": v["vocab_size"],
        "layer_pattern": pattern,
        "mixers": {name: kinds[name] for name in dict.fromkeys(pattern)},
        "mlp": {"d_mlp": d_model if v["glu_dim"] == -1 else v["glu_dim"], "activation": "identity", "bias": v["bias"]},
        "norm_eps": _EPS,
        "embed_scale": 1.0 if v["no_scale_embedding"] else d_model**0.5,
        "tie_word_embeddings": v["tie_word_embeddings"],
        **ids(v),
    }


def _parts(v: Values, config: SeqlibConfig) -> Iterator[Part]:
    for part in top("model.embed_tokens.weight", ""):
        yield Part(part.ours, (), value=1.0) if part.theirs == ("",) else part
    names: Names = {
        **{norm: Part((norm,), (), value=1.0) for norm in ("norm.weight", "mlp_norm.weight")},
        **within("mixer.", "token_mixer.", linear("qkvu_proj", "out_proj")),
        "mixer.lrpe.theta": Part(("mixer.lrpe.theta",), ("token_mixer.lrpe.theta",), tail=(1, -1)),
        **within("mlp.", "channel_mixer.", linear(gate_proj="l1", up_proj="l2", down_proj="l3")),
    }
    for i in range(config.n_layer):
        yield from layer(i, f"model.layers.{i}.", names)


FAMILIES = (
    Family(
        "transnormer",
        _config,
        _parts,
        matches=lambda v: v.get("model_type") == "transnormer",
        defaults=defaulted(_DEFAULTS, _RUNTIME),
        known=frozenset(_RUNTIME),
    ),
)
