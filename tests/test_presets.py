"""Presets have the shapes that were published."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from seqlib.models import BackboneConfig, LanguageModel
from seqlib.models.presets import PRESETS

# Counted from the published shapes; the smallest Mamba by instantiation of the original.
PARAMETERS = {
    "mamba-130m": 129_135_360,
    "mamba-370m": 371_516_416,
    "mamba-790m": 793_204_224,
    "mamba-1.4b": 1_372_178_432,
    "mamba-2.8b": 2_768_345_600,
    "mamba2-130m": 128_989_632,
    "mamba2-370m": 368_346_624,
    "mamba2-780m": 780_161_280,
    "mamba2-1.3b": 1_343_757_312,
    "mamba2-2.7b": 2_702_599_680,
}


@cache
def built(name: str) -> LanguageModel:
    preset = PRESETS[name]
    with torch.device("meta"):
        return LanguageModel(preset.backbone, preset.vocab_size, tie_embeddings=preset.tie_embeddings)


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_of_mamba(name: str) -> None:
    assert count(built(name)) == PARAMETERS[name]


def test_parameters_of_transnormerllm() -> None:
    """Blocks, theta of the one layer with LRPE, and norm weights, which the original does not have."""
    model = built("transnormerllm-385m")
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    assert norms == (2 * 24 + 1) * 1024
    assert count(model.backbone) - norms == 333_447_168 + 1024
    assert count(model) - norms == 464_519_168 + 1024
    assert PRESETS["transnormerllm-7b"].backbone.mlp.width(4096) == 11008


@pytest.mark.parametrize("name", PRESETS)
def test_presets_can_be_stored(name: str) -> None:
    config = PRESETS[name].backbone
    assert BackboneConfig.from_dict(config.to_dict()) == config


def test_patterns() -> None:
    minimax = PRESETS["minimax-text-01-pattern"].backbone.layer_pattern
    assert "".join(minimax) == "llllllla" * 10
    jamba = PRESETS["jamba-pattern"].backbone.layer_pattern
    assert [i for i, name in enumerate(jamba) if name == "a"] == [i for i in range(32) if i % 8 == 4]
    based = PRESETS["based-360m"].backbone.layer_pattern
    assert "".join(based[:8]) == "clwccclw" and based.count("c") == 17


def test_states_of_mamba_are_as_published() -> None:
    """Bytes of a sequence in float32, with windows of d_conv - 1 inputs where the published ones keep d_conv."""
    for name, kept, width in (("mamba-130m", 2.9e6, 1536), ("mamba2-130m", 19.6e6, 1536 + 256)):
        backbone = built(name).backbone
        assert backbone.state_bytes(1, 1) + 24 * width * 4 == pytest.approx(kept, rel=0.02)
