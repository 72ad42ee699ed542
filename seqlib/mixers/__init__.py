"""Sequence mixers, one file each, and the table of them all."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from seqlib.dispatch import BACKENDS
from seqlib.errors import ConfigError
from seqlib.fields import from_fields
from seqlib.mixers.attention import Attention, SlidingAttention
from seqlib.mixers.base import Mixer, MixerConfig
from seqlib.mixers.based import Based
from seqlib.mixers.channel import Channel
from seqlib.mixers.compose import Shared, SharedConfig, Sum, SumConfig
from seqlib.mixers.conv_attention import ConvAttention
from seqlib.mixers.deltanet import DeltaNet
from seqlib.mixers.dss import DSS
from seqlib.mixers.fnet import FNet
from seqlib.mixers.gated_conv import GatedConv
from seqlib.mixers.gated_deltanet import GatedDeltaNet
from seqlib.mixers.gla import GLA
from seqlib.mixers.hyena import Hyena
from seqlib.mixers.kda import KDA
from seqlib.mixers.learned_positions import LearnedPositions
from seqlib.mixers.lightning import Lightning
from seqlib.mixers.linear_transformer import LinearTransformer
from seqlib.mixers.lmu import LMU
from seqlib.mixers.low_rank import Linformer, Luna, Nystromformer
from seqlib.mixers.lru import LRU
from seqlib.mixers.mamba import Mamba
from seqlib.mixers.mamba2 import Mamba2
from seqlib.mixers.mega import Mega
from seqlib.mixers.mlstm import MLSTM
from seqlib.mixers.path import Path
from seqlib.mixers.pattern import BigBird, Longformer, SparseAttention
from seqlib.mixers.performer import Performer
from seqlib.mixers.retnet import RetNet
from seqlib.mixers.rg_lru import RGLRU
from seqlib.mixers.rpe_attention import RPEAttention
from seqlib.mixers.s4 import S4
from seqlib.mixers.s4d import S4D
from seqlib.mixers.s5 import S5
from seqlib.mixers.sgconv import SGConv
from seqlib.mixers.sorted_blocks import LocalAttention, Reformer, Sinkhorn
from seqlib.mixers.synthesizer import Synthesizer
from seqlib.mixers.transnormer import DiagAttention, TransNormer

__all__ = ["MIXERS", "Mixer", "MixerConfig", "build_mixer", "looks_ahead", "mixer_config", "sized"]

MIXERS: dict[str, type[Mixer]] = {
    "attention": Attention,
    "sliding_attention": SlidingAttention,
    "conv_attention": ConvAttention,
    "channel": Channel,
    "mamba": Mamba,
    "mamba2": Mamba2,
    "s4": S4,
    "s4d": S4D,
    "lru": LRU,
    "s5": S5,
    "dss": DSS,
    "sgconv": SGConv,
    "mega": Mega,
    "hyena": Hyena,
    "lmu": LMU,
    "lightning": Lightning,
    "retnet": RetNet,
    "linear_transformer": LinearTransformer,
    "based": Based,
    "gated_conv": GatedConv,
    "transnormer": TransNormer,
    "diag_attention": DiagAttention,
    "gla": GLA,
    "deltanet": DeltaNet,
    "gated_deltanet": GatedDeltaNet,
    "kda": KDA,
    "path": Path,
    "rpe_attention": RPEAttention,
    "mlstm": MLSTM,
    "rg_lru": RGLRU,
    "sum": Sum,
    "shared": Shared,
    "learned_positions": LearnedPositions,
    "local_attention": LocalAttention,
    "longformer": Longformer,
    "bigbird": BigBird,
    "sparse_attention": SparseAttention,
    "linformer": Linformer,
    "nystromformer": Nystromformer,
    "luna": Luna,
    "performer": Performer,
    "reformer": Reformer,
    "sinkhorn": Sinkhorn,
    "synthesizer": Synthesizer,
    "fnet": FNet,
}


def mixer_config(values: Mapping[str, Any] | MixerConfig) -> MixerConfig:
    """A typed config from plain values with a `kind`; unknown kinds and fields are refused with the known ones.

    >>> mixer_config({"kind": "mamba", "d_state": 8}).d_state
    8
    """
    if isinstance(values, MixerConfig):
        return values
    if not isinstance(values, Mapping):
        raise ConfigError(f"a mixer is a dict with a kind and its fields, got {values!r}")
    fields = dict(values)
    kind = fields.get("kind")
    if not isinstance(kind, str) or kind not in MIXERS:
        raise ConfigError(f"unknown mixer kind {kind!r}; known: {', '.join(sorted(MIXERS))}")
    config = from_fields(MIXERS[kind].Config, fields, kind)
    if config.backend not in ("auto", *BACKENDS):
        raise ConfigError(f"{kind}: backend must be one of auto, {', '.join(BACKENDS)}, got {config.backend!r}")
    return config


def looks_ahead(values: Mapping[str, Any] | MixerConfig) -> bool:
    """Whether the mixer of a config reads what follows, so that it has no state and cannot predict the next token."""
    config = mixer_config(values)
    if isinstance(config, SumConfig):
        return any(looks_ahead(part) for part in config.mixers)
    if isinstance(config, SharedConfig) and config.mixer is not None:
        return looks_ahead(config.mixer)
    only = "initial_state" not in MIXERS[config.kind].supports
    return only or not getattr(config, "causal", True) or getattr(config, "bidirectional", False)


def build_mixer(
    config: MixerConfig | Mapping[str, Any], d_model: int, layer_index: int = 0, n_layer: int = 1, *, branches: int = 1
) -> Mixer:
    """The mixer that a config describes, at its place in a stack (see `Mixer`)."""
    config = mixer_config(config)
    return MIXERS[config.kind](config, d_model, layer_index=layer_index, n_layer=n_layer, branches=branches)


def sized(config: Mapping[str, Any], d_model: int, *, headdim: int = 32, window: int = 16) -> dict[str, Any]:
    """A config with heads and windows for a small model where it names none; defaults are made for large ones.

    >>> sized({"kind": "retnet"}, 128)
    {'nheads': 4, 'kind': 'retnet'}
    """
    fields = {f.name: f.default for f in dataclasses.fields(MIXERS[config["kind"]].Config)}
    wanted: dict[str, Any] = {}
    if "nheads" in fields:
        wanted["nheads"] = max(1, d_model // headdim)
        if isinstance(fields.get("headdim"), int):
            wanted["headdim"] = None
    elif "headdim" in fields:
        wanted["headdim"] = min(2 * headdim, d_model)  # of twice as many channels
    for name in ("window", "chunk_size"):
        if fields.get(name) is not None:
            wanted[name] = window
    return wanted | dict(config)
