"""torch.compile sees whole graphs: a decoding step of every mixer, and a training step of a model."""

from __future__ import annotations

import pytest
import torch
from hf_models import OTHERS, STACKS, prompt, tiny
from test_mixers import VARIANTS

from seqlib.mixers import MIXERS, looks_ahead
from seqlib.models import Backbone, BackboneConfig

# Streams add up as many inputs at a time as the position says, so each step would be a graph of its own.
UNTRACED = {"hyena", "sgconv"}
DECODING = [kind for kind in MIXERS if not looks_ahead({"kind": kind, **VARIANTS[kind][0]}) and kind not in UNTRACED]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", DECODING)
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


@pytest.mark.parametrize(("stack", "lean"), [*((stack, True) for stack in (*STACKS, *OTHERS)), ("hybrid", False)])
def test_a_training_step_is_one_graph(stack: str, lean: bool) -> None:
    """Loss and gradients of the compiled model, traced through the backward pass, are those of the plain one."""
    model, ids = tiny(stack).train(), torch.cat(prompt(12, 12))
    asked = {"labels": ids, "use_cache": False, "return_logits": not lean}
    expected = model(ids, **asked).loss
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, **asked).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-5, msg=name)
