"""Weights and configs of published layouts, as ours. Pure maps on names and values; nothing is loaded here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from seqlib.errors import CheckpointMismatch

__all__ = ["config_from_mamba", "weights_from_mamba"]

_TOP = {
    "backbone.embeddings.weight": "model.embed_tokens.weight",
    "backbone.embedding.weight": "model.embed_tokens.weight",
    "backbone.norm_f.weight": "model.backbone.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
_MIXER = {"dt_proj.bias": "dt_bias"}


def config_from_mamba(values: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of SeqlibConfig from a transformers `mamba` config as a dict.

    Source: transformers, models/mamba/configuration_mamba.py.
    """
    rank = values.get("time_step_rank", "auto")
    mixer = {
        "kind": "mamba",
        "d_state": values["state_size"],
        "d_conv": values["conv_kernel"],
        "expand": values["expand"],
        "dt_rank": None if rank == "auto" else rank,
        "conv_bias": values["use_conv_bias"],
        "bias": values["use_bias"],
    }
    return {
        "d_model": values["hidden_size"],
        "n_layer": values["num_hidden_layers"],
        "vocab_size": values["vocab_size"],
        "layer_pattern": "m",
        "mixers": {"m": mixer},
        "norm_eps": values["layer_norm_epsilon"],
        "residual_in_fp32": values["residual_in_fp32"],
        "tie_word_embeddings": values.get("tie_word_embeddings", True),
        "pad_token_id": values.get("pad_token_id"),
        "bos_token_id": values.get("bos_token_id"),
        "eos_token_id": values.get("eos_token_id"),
    }


def weights_from_mamba(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Mamba-1 weights in the layout of state-spaces/mamba or of transformers, under our names.

    Raises:
        CheckpointMismatch: a name that neither layout has.
    """
    made, unknown = {}, []
    for name, tensor in weights.items():
        if name in _TOP:
            made[_TOP[name]] = tensor
            continue
        found = re.fullmatch(r"backbone\.layers\.(\d+)\.(norm\.weight|mixer\.(.+))", name)
        if found is None:
            unknown.append(name)
            continue
        part = found[2] if found[3] is None else f"mixer.{_MIXER.get(found[3], found[3])}"
        # Published convolutions are (d_inner, 1, d_conv), ours (d_inner, d_conv).
        made[f"model.backbone.layers.{found[1]}.{part}"] = (
            tensor.squeeze(1) if part.endswith("conv1d.weight") else tensor
        )
    if unknown:
        raise CheckpointMismatch(f"not Mamba-1 weights: {', '.join(sorted(unknown)[:8])}")
    return made
