"""xLSTM-7B: mLSTM and gated MLPs.

Source: transformers, models/xlstm; NX-AI/xlstm.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from seqlib.hf.configuration import SeqlibConfig
from seqlib.hf.families.base import Names, Part, Values, expect, layer, linear, ported, rows, top, within
from seqlib.hf.families.common import language_model

__all__ = ["FAMILIES"]

_RUNTIME = {"chunk_size", "chunkwise_kernel", "sequence_kernel", "step_kernel", "mode", "return_last_states"}
_RUNTIME |= {"autocast_kernel_dtype", "inference_state_dtype", "max_inference_chunksize", "embedding_dim", "num_blocks"}
_RUNTIME |= {"norm_reduction_force_float32", "add_out_norm"}


def _config(v: Values, match: str) -> dict[str, Any]:
    expect("xlstm", v, use_bias=False, add_out_norm=True)
    multiple = v["ffn_round_up_to_multiple_of"]
    width = -(-int(v["hidden_size"] * v["ffn_proj_factor"]) // multiple) * multiple
    mixer = {
        "kind": "mlstm",
        "nheads": v["num_heads"],
        "expand_k": v["qk_dim_factor"],
        "expand_v": v["v_dim_factor"],
        "gate_cap": v["gate_soft_cap"],
        "eps": v["eps"],
        "norm_eps": v["norm_eps"],
    }
    return {
        **language_model(v),
        "n_layer": v["num_hidden_layers"],
        "layer_pattern": ["m"],
        "mixers": {"m": mixer},
        "mlp": {"d_mlp": width},
        "norm_eps": v["norm_eps"],
        "logit_softcap": v["output_logit_soft_cap"],
    }


def _parts(v: Values, config: SeqlibConfig) -> Iterator[Part]:
    yield from top("backbone.embeddings.weight|embedding.weight|backbone.embedding.weight", "backbone.out_norm.weight")
    d_key, d_value = (int(v["hidden_size"] * v[f"{name}_dim_factor"]) for name in ("qk", "v"))
    four = ("q.weight", "k.weight", "v.weight", "ogate_preact.weight")
    gates = ("igate_preact", "fgate_preact")
    single: Names = {
        **rows("qkvo_proj.weight", four, shares=(d_key, d_key, d_value, d_value)),
        **rows("if_proj.weight", [f"{gate}.weight" for gate in gates]),
        **rows("if_proj.bias", [f"{gate}.bias" for gate in gates]),
    }
    fused: Names = {"qkvo_proj.weight": "qkv_opreact.weight", **linear(if_proj="ifgate_preact")}
    mixer = {
        **(single if v["weight_mode"] == "single" else fused),
        "norm_weight": "multihead_norm.weight",
        **linear("out_proj"),
    }
    mlp: Names = {"gate_proj.weight": "proj_up_gate.weight", "up_proj.weight": "proj_up.weight"}
    if v["weight_mode"] != "single":
        mlp = rows(("gate_proj.weight", "up_proj.weight"), "proj_up_gate_z.weight")
    names: Names = {
        "norm.weight": "norm_mlstm.weight",
        "mlp_norm.weight": "norm_ffn.weight",
        **within("mixer.", "mlstm_layer.", mixer),
        **within("mlp.", "ffn.", {**mlp, "down_proj.weight": "proj_down.weight"}),
    }
    for i in range(config.n_layer):
        yield from layer(i, f"backbone.blocks.{i}.", names)


FAMILIES = (ported("xlstm", "xlstm", _config, _parts, known=frozenset(_RUNTIME)),)
