"""Decoding steps of whole layers in one native call: nobody can tell, except by the clock."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from seqlib import native, use_backend
from seqlib.errors import UnsupportedInput
from seqlib.layers.linear import Linear
from seqlib.layers.norm import RMSNorm
from seqlib.layers.rotary import Rotary
from seqlib.layers.steps import project, why_ops_apart
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


@pytest.fixture(params=["avx512", "avx2", "portable"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The native kernels in one instruction set, where the machine has it."""
    before = torch.ops.seqlib.isa(None)
    try:
        torch.ops.seqlib.isa(request.param)
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])
    yield request.param
    torch.ops.seqlib.isa(before)


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


MATRIX: dict[str, dict[str, Any]] = {
    "retnet": {"nheads": 2},
    "gla": {"nheads": 2},
    "lightning": {"headdim": 10},
    "lightning minimax": {"headdim": 10, "variant": "minimax", "lrpe": True, "bias": True},
    "lightning ring": {"headdim": 20, "variant": "ring", "qk_norm": True, "norm_groups": 2},
    "transnormer": {"nheads": 4},
    "transnormer lrpe": {"nheads": 4, "lrpe": True, "feature_map": "elu"},
    "linear_transformer": {"nheads": 4, "bias": True},
    "linear_transformer sums": {"nheads": 4, "normalized": False, "feature_map": "identity"},
    "based": {"nheads": 4, "d_feature": 5},
    "performer": {"nheads": 4},
    "deltanet": {"nheads": 4},
    "deltanet gate": {"nheads": 2, "nheads_v": 4, "gate": True, "allow_neg_eigval": True},
    "gated_deltanet": {"nheads": 2, "nheads_v": 4, "headdim": 9, "expand_v": 1.0},
    "gated_deltanet sigmoid": {"nheads": 2, "headdim": 9, "gate_activation": "sigmoid"},
    "kda": {"nheads": 2, "headdim": 18, "gate_rank": 3},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MATRIX)
def test_the_end_of_a_matrix_state_is_its_parts(name: str, dtype: torch.dtype, isa: str) -> None:
    """State, norm, gate and output map in one call give what the torch rows give, in every instruction set."""
    torch.manual_seed(0)
    mixer = build_mixer({"kind": name.split(maxsplit=1)[0]} | MATRIX[name], 40).to(dtype)
    close = {"atol": 2e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 4e-2, "rtol": 2e-2}
    with torch.no_grad():
        for batch in (1, 3):
            whole, parts = mixer.initial_state(batch), mixer.initial_state(batch)
            for x in torch.randn(4, batch, 40).to(dtype):
                got, _ = mixer.step(x, whole)
                with use_backend("torch"):
                    want, _ = mixer.step(x, parts)
                torch.testing.assert_close(got, want, **close)
            for a, b in zip(whole.tensors(), parts.tensors()):
                torch.testing.assert_close(a, b, **close)


def test_the_end_is_one_call() -> None:
    """Of every mixer above; a hook on the output map takes it apart."""
    for name, config in MATRIX.items():
        mixer = build_mixer({"kind": name.split(maxsplit=1)[0]} | config, 40)
        names = _ops(mixer)
        assert names.count("seqlib::matrix_step") == 1 and names.count("seqlib::linears") <= 1, name
        out = mixer.out_proj if hasattr(mixer, "out_proj") else mixer.o_proj
        calls: list[int] = []
        out.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        assert "seqlib::matrix_step" not in _ops(mixer) and calls == [1], name


def test_what_does_not_fit_the_end_goes_to_the_ops() -> None:
    """A state too wide for the kernel, which another row takes; and states that the ops refuse in words."""
    wide = build_mixer({"kind": "kda", "nheads": 1, "headdim": 264, "gate_rank": 3}, 40)
    assert "seqlib::matrix_step" not in _ops(wide)
    mixer = build_mixer({"kind": "gla", "nheads": 2}, 40)
    x, state = torch.zeros(2, 40), mixer.initial_state(2)
    strided = torch.zeros(2, 2, 20, 10).transpose(2, 3)
    with torch.no_grad():
        for given in (mixer.initial_state(1).state, state.state.bfloat16(), strided):
            state.state = given
            with pytest.raises(UnsupportedInput, match="state must be"):
                mixer.step(x, state)


class _Calls(TorchDispatchMode):
    """The names of the ops that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def _ops(mixer: Mixer) -> list[str]:
    with torch.no_grad(), _Calls() as calls:
        mixer.step(torch.zeros(1, 40), mixer.initial_state(1))
    return calls.names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_maps_of_the_same_rows_are_those_maps(dtype: torch.dtype, isa: str) -> None:
    """Bit for bit, for any number of rows, biases, widths that fill no vector, and None in the place of a layer."""
    torch.manual_seed(0)
    layers = [Linear(41, d, bias=d % 2 == 0).to(dtype) for d in (70, 1, 33)]
    with torch.no_grad():
        for shape in ((1, 41), (3, 41), (8, 41), (2, 1, 41), (9, 41)):
            x = torch.randn(*shape).to(dtype)
            got = project(x, layers[0], None, *layers[1:])
            assert got[1] is None
            for a, layer in zip((got[0], *got[2:]), layers):
                assert torch.equal(a, layer(x)), shape


def test_maps_are_called_where_somebody_looks() -> None:
    """Adapters, hooks, other dtypes, gradients and backends get their calls, one by one."""
    x, layers = torch.zeros(2, 40), [Linear(40, 3), Linear(40, 5)]
    calls: list[int] = []

    class Adapter(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: Tensor) -> Tensor:
            calls.append(1)
            return self.base(x) + 1

    with torch.no_grad():
        plain, adapted = project(x, *layers), project(x, layers[0], Adapter(layers[1]))
    assert torch.equal(adapted[0], plain[0]) and torch.equal(adapted[1], plain[1] + 1) and calls == [1]
    assert all(y.requires_grad for y in project(x, *layers))
    with torch.no_grad():
        with use_backend(linear="reference"):
            assert why_ops_apart(x, "linear")
        with torch.autocast("cpu"):
            assert project(x, *layers)[0].dtype == torch.bfloat16
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            assert project(fake.from_tensor(x), *layers)[1].shape == (2, 5)
        layers[0].register_forward_hook(lambda *_: calls.append(2))
        project(x, *layers)
    assert calls == [1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_rotation_of_few_tokens(fraction: float, interleaved: bool, dtype: torch.dtype) -> None:
    """One call for all heads, whatever their number and strides, turns as torch does."""
    rotary, positions = Rotary(12, 100.0, fraction, interleaved), torch.tensor([0, 7, 90_000])
    q, k = torch.randn(3, 4, 24).to(dtype).chunk(2, -1)[0], torch.randn(3, 2, 12).to(dtype)
    want = rotary(positions, q, k)
    with torch.no_grad():
        got, sequence = rotary(positions, q, k), rotary(positions[None], q[None], k[None])
    for a, b, c in zip(got, sequence, want):
        assert torch.equal(a, b[0]) and a.dtype == dtype
        torch.testing.assert_close(a, c, atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=0.0)
