"""Published model shapes by name. Data only: nothing here is a model, and no weights are fetched.

    preset = PRESETS["mamba2-130m"]
    model = LanguageModel(preset.backbone, preset.vocab_size, tie_embeddings=preset.tie_embeddings)

Where a family has parts that blocks here do not have, its comment says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from seqlib.layers.mlp import MLPConfig
from seqlib.models.config import BackboneConfig

__all__ = ["PRESETS", "Preset"]


class Preset(NamedTuple):
    """A language model's shape."""

    backbone: BackboneConfig
    vocab_size: int
    tie_embeddings: bool


# Mamba and Mamba-2. Source: README and configuration files of state-spaces/mamba; vocabularies are padded to multiples
# of 8 and 16, tokens from 50277 on are never used.
_MAMBA_SIZES = {"130m": (768, 24), "370m": (1024, 48), "790m": (1536, 48), "1.4b": (2048, 48), "2.8b": (2560, 64)}
_MAMBA2_SIZES = {"130m": (768, 24), "370m": (1024, 48), "780m": (1536, 48), "1.3b": (2048, 48), "2.7b": (2560, 64)}


def _mamba(kind: str, d_model: int, n_layer: int, vocab_size: int) -> Preset:
    config = BackboneConfig(d_model=d_model, n_layer=n_layer, mixers={"m": _mixer(kind)}, layer_pattern=("m",))
    return Preset(config, vocab_size, True)


# TransNormerLLM: LRPE in the first layer, decay in all. The 385M width of the MLP is that of its config, which is 8/3
# d_model rounded up to a multiple of 256; for the others that rule is taken. Its norms have no weights (here they have,
# and start at 1), and it multiplies embeddings by sqrt(d_model). Source: OpenNLPLab/TransNormerLLM; Qin et al. 2023.
_TRANSNORMERLLM_SIZES = {"385m": (1024, 24), "1b": (2048, 16), "7b": (4096, 30)}


def _transnormerllm(d_model: int, n_layer: int) -> Preset:
    config = BackboneConfig(
        d_model=d_model,
        n_layer=n_layer,
        mixers={"first": _mixer("lightning", headdim=128, lrpe=True), "l": _mixer("lightning", headdim=128)},
        layer_pattern=("first", *["l"] * (n_layer - 1)),
        mlp=MLPConfig(activation="identity", multiple_of=256),
        norm_eps=1e-6,
    )
    return Preset(config, 64000, False)


# Based: linear layers, then a window, every fifth layer; the rest gated convolutions. The released models have a window
# of 256 and an MLP of 2 d_model. Source: HazyResearch/based, configs of based-360m and based-1b.
_BASED_SIZES = {
    "360m": (1024, 27, (1, 6, 11, 16, 21), (2, 7, 12, 17, 22)),
    "1.3b": (1792, 36, (1, 6, 11, 16, 21, 27, 33), (2, 7, 12, 17, 22, 28, 34)),
}


def _based(d_model: int, n_layer: int, linear: tuple[int, ...], window: tuple[int, ...]) -> Preset:
    config = BackboneConfig(
        d_model=d_model,
        n_layer=n_layer,
        mixers={
            "c": _mixer("gated_conv"),
            "l": _mixer("based", nheads=16),
            "w": _mixer("sliding_attention", nheads=16, window=256),
        },
        layer_pattern=tuple("l" if i in linear else "w" if i in window else "c" for i in range(n_layer)),
        mlp=MLPConfig(d_mlp=2 * d_model),
    )
    return Preset(config, 50257, True)


def _mixer(kind: str, **fields: Any) -> Any:
    return {"kind": kind, **fields}


# Layer patterns of hybrids, with one dense MLP where they have experts.
_HYBRIDS: Mapping[str, Preset] = {
    # Seven lightning layers, then softmax attention with rotary positions on half of each head. MiniMax-Text-01 has 32
    # experts of this width and scaled residuals after its norms. Source: MiniMax 2025 (arXiv 2501.08313); transformers,
    # models/minimax.
    "minimax-text-01-pattern": Preset(
        BackboneConfig(
            d_model=6144,
            n_layer=80,
            mixers={
                "l": _mixer("lightning", nheads=64, headdim=128, variant="minimax"),
                "a": _mixer("attention", nheads=64, nheads_kv=8, headdim=128, rope_theta=1e7, rotary_fraction=0.5),
            },
            layer_pattern=("l*7", "a"),
            mlp=MLPConfig(d_mlp=9216),
        ),
        200064,
        False,
    ),
    # Attention without positions in the fifth of every eight layers; Jamba has 16 experts in every second MLP.
    # Source: Lieber et al. 2024 (arXiv 2403.19887); transformers, models/jamba.
    "jamba-pattern": Preset(
        BackboneConfig(
            d_model=4096,
            n_layer=32,
            mixers={
                "m": _mixer("mamba", inner_norm="learned"),
                "a": _mixer("attention", nheads=32, nheads_kv=8, rotary=False),
            },
            layer_pattern=("m*4", "a", "m*3"),
            mlp=MLPConfig(d_mlp=14336),
            norm_eps=1e-6,
        ),
        65536,
        False,
    ),
    # Mamba and sliding windows in turn. Source: Ren et al. 2024 (Samba, arXiv 2406.07522), section 2; our own size.
    "samba-pattern": Preset(
        BackboneConfig(
            d_model=1024,
            n_layer=24,
            mixers={"m": _mixer("mamba"), "w": _mixer("sliding_attention", nheads=16, window=2048)},
            layer_pattern=("m", "w"),
            mlp=MLPConfig(),
        ),
        32000,
        True,
    ),
}

PRESETS: Mapping[str, Preset] = {
    **{f"mamba-{name}": _mamba("mamba", *size, 50280) for name, size in _MAMBA_SIZES.items()},
    **{f"mamba2-{name}": _mamba("mamba2", *size, 50288) for name, size in _MAMBA2_SIZES.items()},
    **{f"transnormerllm-{name}": _transnormerllm(*size) for name, size in _TRANSNORMERLLM_SIZES.items()},
    **{f"based-{name}": _based(*size) for name, size in _BASED_SIZES.items()},
    **_HYBRIDS,
}
