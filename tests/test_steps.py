"""Decoding steps of whole layers in one native call: nobody can tell, except by the clock."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from seqlib import native, use_backend
from seqlib.errors import UnsupportedInput
from seqlib.layers.linear import Linear
from seqlib.layers.norm import RMSNorm
from seqlib.mixers import Mixer, build_mixer
from seqlib.mixers.fused import why_apart

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


MAMBA2: dict[str, dict[str, Any]] = {
    "defaults": {},
    "groups": {"d_state": 37, "headdim": 12, "d_inner": 72, "ngroups": 3, "bias": True},
    "norm before gate": {"norm_before_gate": True, "ngroups": 2, "conv_bias": False},
    "no norm": {"norm": False, "D_per_channel": True},
    "limits": {"dt_limit_min": 0.4, "dt_limit_max": 0.9, "d_conv": 3},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MAMBA2)
def test_mamba2_as_a_whole_is_its_parts(name: str, dtype: torch.dtype) -> None:
    """Alone, and as a residual branch whose stream is float32; its step size comes from another softplus."""
    torch.manual_seed(0)
    mixer = build_mixer({"kind": "mamba2", "headdim": 8, "d_state": 16} | MAMBA2[name], 40).to(dtype)
    norm, close = RMSNorm(40).to(dtype), {"atol": 1e-5 if dtype == torch.float32 else 2e-2, "rtol": 0.0}
    with torch.no_grad():
        mixer.D.uniform_(0.5, 1.5)
        norm.weight.uniform_(0.5, 1.5)
        for batch in (1, 3):
            whole, parts = mixer.initial_state(batch), mixer.initial_state(batch)
            for x in torch.randn(4, batch, 40):
                assert mixer.why_apart(x.to(dtype), whole) is None and mixer.why_apart(x, whole, norm) is None
                got = mixer.step(x.to(dtype), whole)[0], mixer.added_step(x, norm, whole)[0]
                with use_backend("torch"):
                    want = mixer.step(x.to(dtype), parts)[0], mixer.added_step(x, norm, parts)[0]
                for a, b in zip(got, want):
                    torch.testing.assert_close(a, b, **close)
            for a, b in zip(whole.tensors(), parts.tensors()):
                torch.testing.assert_close(a, b, **close)


def test_whoever_wants_the_parts_gets_them() -> None:
    """Backends asked for, gradients, adapters in the place of a projection, and what the library does not take."""
    x, given = torch.zeros(2, 40), (torch.zeros(2, 80, 16), "linear", "selective_scan")
    with torch.no_grad():
        assert why_apart(layer("mamba"), x, *given) is None
        assert why_apart(layer("mamba"), x.double(), *given)
        assert why_apart(layer("mamba"), torch.zeros(9, 40), torch.zeros(9, 80, 16), "linear")
        with use_backend(selective_scan="torch"):
            assert why_apart(layer("mamba"), x, *given)
        with torch.autocast("cpu"):
            assert why_apart(layer("mamba"), x, *given)
        adapted = layer("mamba")
        adapted.x_proj = type("Adapter", (Linear,), {})(80, 3 + 32, bias=False)
        assert why_apart(adapted, x, *given)
    assert why_apart(layer("mamba"), x, *given)


def test_why_mamba2_steps_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thing that the kernels do not know is named, and nothing else is."""
    monkeypatch.setattr("seqlib.mixers.mamba2.why_apart", lambda *_, **__: None)

    def reason(x: Tensor | None = None, before: RMSNorm | None = None, **config: Any) -> str:
        mixer = build_mixer({"kind": "mamba2", "headdim": 8} | config, 40)
        return mixer.why_apart(torch.zeros(2, 40) if x is None else x, mixer.initial_state(2), before) or ""

    assert not reason() and not reason(before=RMSNorm(40)) and not reason(norm=False, ngroups=2, bias=True)
    for config in ({"in_scales": (1, 2, 1, 1, 1)}, {"d_conv": 5}, {"headdim": 10}):
        assert "in_scales" in reason(**config)
    assert "offset" in reason(before=RMSNorm(40, offset=1.0))
    assert "float32" in reason(torch.zeros(2, 40).bfloat16()) and "float32" in reason(before=RMSNorm(40).half())


@pytest.mark.parametrize(
    "config",
    [
        {"kind": "s4d"},
        {"kind": "s4d", "init": "real", "d_state": 5 * 2},
        {"kind": "s4d", "init": "real", "discretization": "bilinear", "d_state": 6},
        {"kind": "dss", "d_state": 21},
    ],
    ids=str,
)
def test_a_position_of_a_state_space_is_its_parts(config: dict) -> None:
    """Rows and channels that fill no vector; rounding is all that tells the call from its parts."""
    torch.manual_seed(0)
    mixer, x = build_mixer(config, 37), torch.randn(5, 3, 37)
    states = [mixer.initial_state(3), mixer.initial_state(3)]
    with torch.no_grad():
        for u in x:
            got, _ = mixer.step(u, states[0])
            with use_backend(long_conv="torch"):
                want, _ = mixer.step(u, states[1])
            assert torch.allclose(got, want, atol=1e-5)
    assert torch.allclose(states[0].ssm, states[1].ssm, atol=1e-6)


def test_a_state_of_another_batch_is_refused() -> None:
    mixer = layer("mamba")
    with torch.no_grad(), pytest.raises(UnsupportedInput, match="state must be"):
        mixer.step(torch.zeros(2, 40), mixer.initial_state(1))
