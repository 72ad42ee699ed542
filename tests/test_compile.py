"""torch.compile sees whole graphs: a decoding step of every mixer, and a training step of a model."""

from __future__ import annotations

import pytest
import torch
from test_mixers import VARIANTS

from seqlib.mixers import MIXERS
from seqlib.models import Backbone, BackboneConfig

# Streams add up as many inputs at a time as the position says, so each step would be a graph of its own.
UNTRACED = {"hyena", "sgconv"}


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", sorted(MIXERS.keys() - UNTRACED))
@torch.no_grad()
def test_a_decoding_step_is_one_graph(kind: str) -> None:
    """States allocated for all positions are written in place, so the compiled step serves the whole text."""
    mixers = {"m": {"kind": kind, **VARIANTS[kind][0]}}
    backbone = Backbone(BackboneConfig(d_model=32, n_layer=2, mixers=mixers, layer_pattern="m")).eval()
    x = torch.randn(2, 5, 32)
    step = torch.compile(backbone.step, fullgraph=True, backend="eager")
    state, made = backbone.initial_state(2, max_seqlen=5), []
    for t in range(5):
        y, state = step(x[:, t], state)
        made.append(y)
    torch.testing.assert_close(torch.stack(made, 1), backbone(x)[0], rtol=0, atol=2e-5)
