"""Decoding steps of whole layers in one native call: nobody can tell, except by the clock."""

from __future__ import annotations

import copy
import importlib
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from seqlib import dispatch, native, use_backend
from seqlib.errors import BackendUnavailable, UnsupportedInput
from seqlib.layers.linear import Linear, ordinary
from seqlib.layers.norm import RMSNorm
from seqlib.layers.rotary import Rotary
from seqlib.layers.steps import project
from seqlib.mixers import Mixer, build_mixer
from seqlib.models.backbone import Backbone
from seqlib.models.config import BackboneConfig
from seqlib.ops import mamba2_step

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
                got = mixer.step(x.to(dtype), whole)[0], mixer.added_step(x, norm, whole)[0]
                with use_backend("torch"):
                    want = mixer.step(x.to(dtype), parts)[0], mixer.added_step(x, norm, parts)[0]
                for a, b in zip(got, want):
                    torch.testing.assert_close(a, b, **close)
            for a, b in zip(whole.tensors(), parts.tensors()):
                torch.testing.assert_close(a, b, **close)


def test_whoever_wants_the_parts_gets_them() -> None:
    """Backends asked for, adapters in the place of a projection, hooks, autocast, and what no native row takes."""
    x = torch.zeros(2, 40)
    fused = "seqlib::mamba_step"
    assert fused in _ops(layer("mamba"), x)
    assert fused not in _ops(layer("mamba").double(), x.double())
    assert fused not in _ops(layer("mamba"), torch.zeros(9, 40))
    for asked in ({"selective_scan": "torch"}, {"mamba_step": "torch"}, {"mamba_step": "reference"}):
        with use_backend(**asked):
            assert fused not in _ops(layer("mamba"), x)
    with use_backend("torch"):
        assert not [name for name in _ops(layer("mamba"), x) if name.startswith("seqlib::")]
    with torch.autocast("cpu"):
        assert fused not in _ops(layer("mamba"), x)
    assert fused not in _ops(watched(layer("mamba"))[0], x)
    adapted = layer("mamba")
    adapted.x_proj = type("Adapter", (Linear,), {})(80, 3 + 32, bias=False)
    assert fused not in _ops(adapted, x)


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "s4d", "gla"])
def test_a_pinned_backend_reaches_the_parts(kind: str) -> None:
    """What a mixer's config asks for holds while it decodes, too."""
    mixer = build_mixer({"kind": kind, "backend": "torch"}, 64)
    x = torch.zeros(1, 64)
    native_ops = {name.removeprefix("seqlib::") for name in _ops(mixer, x) if name.startswith("seqlib::")}
    assert not native_ops & {"mamba_step", "mamba2_step", "matrix_step", "diag_step", "selective_scan_step",
                             "linear_attention_step"}  # fmt: skip


def test_decoding_is_seen() -> None:
    """`used` lists what a token ran, and the table of a fused step says what runs and why not the others."""
    model = Backbone(
        BackboneConfig(d_model=40, n_layer=2, mixers={"m": {"kind": "mamba2", "headdim": 8}}, layer_pattern="m")
    )
    with torch.no_grad():
        model.step(torch.zeros(1, 40), model.initial_state(1))
    assert "seqlib.ops.mamba2_step.native_impl:mamba2_step" in dispatch.used()
    inputs = next(c for c in importlib.import_module("seqlib.ops.mamba2_step.cases").CASES if c.name == "odd_heads")
    assert "headdim in fours" in dispatch.explain("mamba2_step", **inputs.inputs(torch.float32))


def test_what_was_found_is_forgotten_after_a_change() -> None:
    """A hook, a layer, a parameter, a dtype or a backend that comes between two tokens is seen by the second."""
    model = Backbone(BackboneConfig(d_model=40, n_layer=2, mixers={"m": {"kind": "mamba"}}, layer_pattern="m")).eval()
    x, state, calls = torch.zeros(1, 40), model.initial_state(1), []
    mixer = model.mixer(1)

    def count(x: Tensor = x) -> int:
        with torch.no_grad(), _Calls() as seen:
            model.step(x, state)
        return seen.names.count("seqlib::mamba_step")

    assert count() == 2 and count() == 2
    handle = mixer.x_proj.register_forward_hook(lambda *_: calls.append(1))
    assert count() == 1 and calls == [1]
    handle.remove()
    assert count() == 2 and calls == [1]
    mixer.out_proj.forward = lambda x: calls.append(2) or x[..., :40]
    assert count() == 1 and calls == [1, 2]
    del mixer.out_proj.forward
    assert count() == 2
    with use_backend(causal_conv1d="torch"):
        assert count() == 0
    with torch.autocast("cpu"):
        assert count() == 0
    assert count() == 2
    before = mixer.in_proj
    mixer.in_proj = nn.Linear(40, 160, bias=False)
    assert count() == 1
    mixer.in_proj = before
    assert count() == 2
    mixer.in_proj.weight = nn.Parameter(mixer.in_proj.weight.detach().double(), requires_grad=False)
    assert count() == 1
    mixer.in_proj.weight.data = mixer.in_proj.weight.data.float()
    assert count() == 2
    ordinary(mixer)
    assert count() == 1
    assert all(m._binding._known is None for m in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))))


def test_threads_keep_their_modes_apart() -> None:
    """Two threads step one model by turns, one of them with a backend in scope: each gets its own rows."""
    model = Backbone(BackboneConfig(d_model=40, n_layer=2, mixers={"m": {"kind": "mamba"}}, layer_pattern="m")).eval()
    both, first = threading.Barrier(2, timeout=60), threading.Event()

    def meet(*_: Any) -> None:
        both.wait()
        if dispatch.preferred("mamba_step") == "torch":
            assert first.wait(60), "the other thread has not come to its end"

    model.layers[0].register_forward_pre_hook(meet)  # a hooked layer calls forward

    def run(scope: dict[str, str]) -> int:
        with torch.no_grad(), use_backend(**scope), _Calls() as seen:
            model.step(torch.zeros(1, 40), model.initial_state(1))
        first.set()
        return seen.names.count("seqlib::mamba_step")

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(run, ({}, {"mamba_step": "torch"})))
    assert found == [1, 0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"d_conv": 6}, "d_conv up to 4"),
        ({"headdim": 10}, "headdim in fours"),
        ({"dtype": torch.float64}, "dtype is float64"),
        ({"stream": torch.bfloat16}, "residual stream"),
        ({"rows": 9}, "9 rows"),
    ],
    ids=lambda v: str(v)[:20],
)
def test_why_mamba2_steps_in_parts(changes: dict[str, Any], reason: str) -> None:
    """Each thing that the kernels do not know is named by the table."""
    sizes = {"d_conv": 4, "headdim": 8, "rows": 1} | changes
    mixer = build_mixer({"kind": "mamba2", "headdim": sizes["headdim"], "d_conv": sizes["d_conv"]}, 40)
    mixer.to(sizes.get("dtype", torch.float32))
    state, x = mixer.initial_state(sizes["rows"]), torch.zeros(sizes["rows"], 40)
    x = x.to(sizes.get("stream", mixer.D.dtype))
    given = (
        x, None, 0.0, mixer.in_proj.weight, None, mixer.conv1d.weight, mixer.conv1d.bias, mixer.dt_bias, mixer.A_log,
        mixer.D, 0.0, 1.0, mixer.norm_weight, 1e-5, False, mixer.out_proj.weight, None, state.conv, state.state,
    )  # fmt: skip
    with torch.no_grad(), pytest.raises(BackendUnavailable, match=reason):
        mamba2_step(*given, backend="native")


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


def _names(run: Any) -> list[str]:
    with torch.no_grad(), _Calls() as calls:
        run()
    return calls.names


def _ops(mixer: Mixer, x: Tensor | None = None) -> list[str]:
    x = torch.zeros(1, 40) if x is None else x
    return _names(lambda: mixer.step(x, mixer.initial_state(len(x))))


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
            assert "seqlib::linears" not in _names(lambda: project(x, *layers))
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
