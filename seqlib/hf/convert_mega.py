"""Layers of facebookresearch/mega as ours: a config and a state dict. Pure maps on names; nothing is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from seqlib.errors import CheckpointMismatch
from seqlib.mixers import build_mixer

__all__ = ["layers_from_mega", "mixer_from_mega"]

_NAMES = {
    "move.omega": "ema.omega",
    "mx_proj.weight": "m_proj.weight",
    "mx_proj.bias": "m_proj.bias",
    "gamma": "qk_weight",
    "beta": "qk_bias",
    "rel_pos_bias.rel_pos_bias": "position_bias",
} | {f"{layer}.{part}": f"{layer}.{part}" for layer in ("v_proj", "h_proj") for part in ("weight", "bias")}
_AVERAGE = ("delta", "alpha", "beta", "gamma")
_ROTARY = ("rel_pos_bias.alpha", "rel_pos_bias.beta")


def mixer_from_mega(
    weights: Mapping[str, Tensor], *, scores: str = "softmax", chunk_size: int | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """One gated attention layer (MovingAverageGatedAttention) as a `mega` mixer.

    Published models cut the kernel of the average after `truncation` positions, which this layer does not; at that
    distance it has decayed. The norm of the layer (`norm.*`) is the block's, and so is the choice of its place.

    Args:
        weights: tensors by their names within the layer, as `move.delta`.
        scores: `attention_activation_fn` of the checkpoint's config, "softmax", "laplace" or "relu2".
        chunk_size: of the checkpoint's config; None for none.

    Returns:
        A mixer config as a dict, and a state dict for `build_mixer(config, d_model)`.

    Raises:
        CheckpointMismatch: names or shapes do not fit.

    Source: facebookresearch/mega, fairseq/modules/moving_average_gated_attention.py.
    """
    made, left = {}, dict(weights)
    try:
        d_model = len(left["move.omega"])
        for name in _AVERAGE:
            tensor = left.pop(f"move.{name}")
            made[f"ema.{name}"] = tensor.reshape(
                -1, d_model, tensor.shape[1]
            )  # both directions lie one after the other
        rotary = _ROTARY[0] in left
        if rotary:
            made["position_bias"] = torch.cat([left.pop(name) for name in _ROTARY])
    except KeyError as missing:
        raise CheckpointMismatch(f"not a layer of facebookresearch/mega: it has no {missing.args[0]}") from missing
    made |= {ours: left.pop(name) for name, ours in _NAMES.items() if name in left}
    unknown = [n for n in left if not n.startswith("norm.") and not n.endswith("_float_tensor")]
    if unknown:
        raise CheckpointMismatch(f"not a layer of facebookresearch/mega: it has {', '.join(sorted(unknown)[:8])}")
    config: dict[str, Any] = {
        "kind": "mega",
        "d_state": made["ema.delta"].shape[2],
        "d_qk": made["qk_weight"].shape[-1] if "qk_weight" in made else 0,
        "d_hidden": len(made["v_proj.weight"]) if "v_proj.weight" in made else 0,
        "chunk_size": chunk_size,
        "scores": scores,
        "bias": "rotary" if rotary else "simple",
        "bidirectional": len(made["ema.delta"]) == 2,
    }
    if not rotary and "position_bias" in made:
        config["max_positions"] = (len(made["position_bias"]) + 1) // 2
    _check(config, made, d_model)
    return config, made


def layers_from_mega(
    weights: Mapping[str, Tensor], **options: Any
) -> dict[str, tuple[dict[str, Any], dict[str, Tensor]]]:
    """Every such layer of a model's weights, by the prefix of its names; options as for `mixer_from_mega`."""
    prefixes = sorted(name.removesuffix("move.omega") for name in weights if name.endswith("move.omega"))
    if not prefixes:
        raise CheckpointMismatch("there is no layer of facebookresearch/mega here: no name ends in move.omega")
    return {
        prefix: mixer_from_mega(
            {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)}, **options
        )
        for prefix in prefixes
    }


def _check(config: dict[str, Any], made: dict[str, Tensor], d_model: int) -> None:
    required = {*_NAMES.values(), *(f"ema.{n}" for n in _AVERAGE)}
    wrong = [f"no {n}" for n in sorted(required - made.keys())]
    if not wrong:
        with torch.device("meta"):
            wanted = build_mixer(config, d_model).state_dict()
        wrong = [
            f"{n} {tuple(t.shape)} for {tuple(wanted[n].shape)}" for n, t in made.items() if t.shape != wanted[n].shape
        ]
    if wrong:
        raise CheckpointMismatch(f"these weights do not fit a mega of width {d_model}: {'; '.join(wrong)}")
