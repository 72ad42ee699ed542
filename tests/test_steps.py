"""Decoding steps of whole layers in one native call: nobody can tell, except by the clock."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from seqlib import native, use_backend
from seqlib.errors import UnsupportedInput
from seqlib.layers.linear import Linear
from seqlib.mixers import Mixer, build_mixer
from seqlib.mixers.fused import fusible

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(native.why_unavailable("cpu") is not None, reason="needs the compiled library"),
]
LAYERS: dict[str, dict] = {
    "mamba": {},
    "mamba with biases": {"kind": "mamba", "bias": True, "conv_bias": False, "d_state": 5},
}


def layer(name: str, dtype: torch.dtype = torch.float32) -> Mixer:
    torch.manual_seed(0)
    return build_mixer({"kind": name} | LAYERS[name], 40).to(dtype)


def decode(mixer: Mixer, batch: int = 2) -> list[Tensor]:
    """Outputs of five steps and the state after them."""
    dtype = mixer.in_proj.weight.dtype
    state = mixer.initial_state(batch)
    with torch.no_grad():
        made = [mixer.step(x, state)[0] for x in torch.linspace(-1, 1, 5 * batch * 40).view(5, batch, 40).to(dtype)]
    return [*made, *state.tensors()]


def watched(mixer: Mixer) -> tuple[Mixer, list[int]]:
    """The same layer, with somebody who counts the calls of a projection."""
    calls: list[int] = []
    mixer.in_proj.register_forward_hook(lambda *_: calls.append(1))
    return mixer, calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_the_whole_is_its_parts(name: str, batch: int, dtype: torch.dtype) -> None:
    """Bit for bit; a hook sees every call, so there the parts run."""
    parts, calls = watched(layer(name, dtype))
    for got, want in zip(decode(layer(name, dtype), batch), decode(parts, batch)):
        assert torch.equal(got, want)
    assert len(calls) == 5


def test_whoever_wants_the_parts_gets_them() -> None:
    """Backends asked for, gradients, adapters in the place of a projection, and what the library does not take."""
    x, given = torch.zeros(2, 40), (torch.zeros(2, 80, 16), "linear", "selective_scan")
    with torch.no_grad():
        assert fusible(layer("mamba"), x, *given)
        assert not fusible(layer("mamba"), x.double(), *given)
        assert not fusible(layer("mamba"), torch.zeros(9, 40), torch.zeros(9, 80, 16), "linear")
        with use_backend(selective_scan="torch"):
            assert not fusible(layer("mamba"), x, *given)
        with torch.autocast("cpu"):
            assert not fusible(layer("mamba"), x, *given)
        adapted = layer("mamba")
        adapted.x_proj = type("Adapter", (Linear,), {})(80, 3 + 32, bias=False)
        assert not fusible(adapted, x, *given)
    assert not fusible(layer("mamba"), x, *given)


def test_a_state_of_another_batch_is_refused() -> None:
    mixer = layer("mamba")
    with torch.no_grad(), pytest.raises(UnsupportedInput, match="state must be"):
        mixer.step(torch.zeros(2, 40), mixer.initial_state(1))
