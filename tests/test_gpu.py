"""Everything again on a real device, in memory that held NaN: `make test-gpu`, and `make sanitize-gpu`."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_cuda import KERNELS, SEGMENTS, _steps
from test_ops import CASES, OPS, _close, _run, _widen

from seqlib import use_backend
from seqlib.dispatch import Impl, Op, resolve
from seqlib.errors import BackendUnavailable
from seqlib.mixers import build_mixer
from seqlib.mixers.base import MixerConfig
from seqlib.mixers.mamba import MambaConfig
from seqlib.mixers.mamba2 import Mamba2Config
from seqlib.models import Backbone, BackboneConfig
from seqlib.ops import causal_conv1d, selective_scan
from seqlib.ops.case import Case
from seqlib.ops.rpe_attention.exponentials import Exponentials
from seqlib.sequence import SequenceInfo, State

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _poisoned_device() -> None:
    """What the allocator hands out next held NaN."""
    torch.cuda.empty_cache()
    held = [torch.full((2**k,), float("nan"), device="cuda") for k in range(8, 26) for _ in range(4)]
    del held
    torch.cuda.synchronize()


@pytest.fixture
def tune() -> Iterator[Any]:
    used: set[str] = set()

    def set_plan(**plan: int) -> None:
        for key, value in plan.items():
            used.add(key)
            torch.ops.seqlib.cuda_tune(key, value)

    yield set_plan
    for key in used:
        torch.ops.seqlib.cuda_tune(key, 0)


def _grid() -> Iterator[Any]:
    for name, op in OPS.items():
        for impl in op.impls:
            if impl.name != "reference" and "cuda" in (*impl.devices, "cuda")[:1]:
                for case in CASES[name]:
                    for dtype in DTYPES:
                        if not case.bench and (not impl.dtypes or dtype in impl.dtypes):
                            parts = (name, impl.name, impl.form, case.name, str(dtype)[6:])
                            yield pytest.param(op, impl, case, dtype, id="-".join(parts))


def _on_device(inputs: dict[str, Any]) -> dict[str, Any]:
    """Sequence information and fitted exponentials, which cases keep on the CPU, beside the tensors."""

    def move(t: Any) -> Any:
        if isinstance(t, SequenceInfo):
            return SequenceInfo(move(t.starts), move(t.padding_mask))
        if isinstance(t, Exponentials):
            return Exponentials(*map(move, t))
        return t.cuda() if isinstance(t, torch.Tensor) else t

    return {k: move(v) if isinstance(v, (SequenceInfo, Exponentials)) else v for k, v in inputs.items()}


@pytest.mark.parametrize(("op", "impl", "case", "dtype"), list(_grid()))
def test_row_equals_reference_on_the_gpu(op: Op, impl: Impl, case: Case, dtype: torch.dtype) -> None:
    inputs = _on_device(case.inputs(dtype, "cuda", requires_grad=impl.grad))
    try:
        resolve(op, op.facts(**inputs), impl.form, impl.name)
    except BackendUnavailable as error:
        pytest.skip(f"outside this row: {error}")
    exact = torch.float64 if dtype == torch.float32 else torch.float32
    truth = {
        k: v.map(lambda t: _widen(t, exact)) if isinstance(v, State) else _widen(v, exact) for k, v in inputs.items()
    }
    got, got_grads = _run(op, inputs, impl.form, impl.name)
    want, want_grads = _run(op, truth, "reference", "reference")
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        _close(f"output {i}", a, b, dtype, gradient=False)
    assert got_grads.keys() == (want_grads.keys() if impl.grad else set())
    for k in got_grads:
        _close(f"gradient of {k}", got_grads[k], want_grads[k], dtype, gradient=True)


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("name", ["causal_conv1d", "linear_scan", "selective_scan"])
def test_native_results_have_one_value(name: str, segments: int, tune) -> None:
    """Outputs and gradients are the same bits in every run."""
    tune(**dict.fromkeys(SEGMENTS, segments))
    for case in (c for c in CASES[name] if c.bench):
        inputs = case.inputs(torch.float32, "cuda", requires_grad=True)
        form = next(impl.form for impl in OPS[name].impls if impl.name == "native")
        first, first_grads = _run(OPS[name], inputs, form, "native")
        for _ in range(3):
            again, again_grads = _run(OPS[name], inputs, form, "native")
            assert all(torch.equal(a, b) for a, b in zip(first, again))
            assert all(torch.equal(first_grads[k], again_grads[k]) for k in first_grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("kind", list(_steps()))
def test_steps_equal_torch_on_the_gpu(kind: str, dtype: torch.dtype) -> None:
    module = importlib.import_module(f"seqlib.ops.{kind.split(maxsplit=1)[0]}")
    arguments = _steps()[kind](lambda *shape: torch.randn(*shape, device="cuda").to(dtype))
    wide = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    wide["state"] = wide["state"].clone()
    with torch.no_grad():
        got = module.step(**arguments, backend="native")
        want = module.step(**wide, backend="torch")
    _close("y", got, want, dtype, gradient=False)
    _close("state", arguments["state"], wide["state"], dtype, gradient=False)


def test_offsets_beyond_two_to_the_31() -> None:
    """The last channels of a tensor of more than 2^31 elements give what a copy of them gives."""
    seqlen, width, d = 70000, 32768, 64
    if torch.cuda.mem_get_info()[0] < 3 * seqlen * width * 2:
        pytest.skip("needs 14 GB of free device memory")
    wide = torch.randn(1, seqlen, width, device="cuda", dtype=torch.bfloat16)
    x = wide[..., -d:]
    weight, A = torch.randn(d, 4, device="cuda"), -torch.rand(d, 16, device="cuda")
    B = torch.randn(1, seqlen, 16, device="cuda", dtype=torch.bfloat16)
    for run in (
        lambda t: causal_conv1d(t, weight, activation="silu", backend="native"),
        lambda t: selective_scan(t, t.abs(), A, B, B, z=t, backend="native"),
    ):
        for a, b in zip(run(x), run(x.contiguous())):
            assert torch.equal(a, b)


MIXERS = {"mamba": MambaConfig(), "mamba2": Mamba2Config(headdim=32, d_state=32)}


@pytest.mark.parametrize("kind", list(MIXERS))
def test_a_graph_captures_the_decoding_step(kind: str) -> None:
    """Replaying a captured step goes on from the state, as calls one after another do."""
    config: MixerConfig = MIXERS[kind]
    with torch.device("cuda"), torch.no_grad():
        mixer = build_mixer(config, 64, 0, 1)
        tokens = torch.randn(6, 2, 64)
        state, eager = mixer.initial_state(2), mixer.initial_state(2)
        want = [mixer.step(x, eager)[0] for x in tokens]
        x = tokens[0].clone()
        warm = mixer.initial_state(2)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            mixer.step(x, warm)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, _ = mixer.step(x, state)
        for t in state.tensors():
            t.zero_()
        for token, expected in zip(tokens, want):
            x.copy_(token)
            graph.replay()
            torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_whole_steps_in_a_graph_equal_the_ops(batch: int, dtype: torch.dtype, tune) -> None:
    """Layers of three kernels that start before the last one ends, replayed, give what the ops give in float32."""
    torch.manual_seed(0)
    mixers: dict[str, MixerConfig] = {"m": Mamba2Config(ngroups=2), "n": Mamba2Config(norm_before_gate=True)}
    config = BackboneConfig(d_model=512, n_layer=4, layer_pattern=("m", "n", "m", "n"), mixers=mixers)
    with torch.device("cuda"), torch.no_grad():
        model = Backbone(config).to(dtype)
        exact, tokens = copy.deepcopy(model).float(), torch.randn(6, batch, 512)
        state, wide = model.initial_state(batch), exact.initial_state(batch)
        with use_backend("torch"):
            want = torch.stack([exact.step(x.to(dtype).float(), wide)[0] for x in tokens])
        x = tokens[0].to(dtype, copy=True)
        for overlap in (1, 2):
            tune(overlap=overlap)
            with use_backend(mamba2_step="native"):
                model.step(x, model.initial_state(batch))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y, _ = model.step(x, state)
            for t in (t for layer in state for t in layer.tensors()):
                t.zero_()
            got = []
            for token in tokens:
                x.copy_(token)
                graph.replay()
                got.append(y.clone())
            _close("y", torch.stack(got), want, dtype, gradient=False)
            for layer, exactly in zip(state, wide):
                for a, b in zip(layer.tensors(), exactly.tensors()):
                    _close("state", a, b, dtype, gradient=False)


@pytest.mark.parametrize("kind", list(MIXERS))
def test_a_training_step_compiles_whole(kind: str) -> None:
    """torch.compile(fullgraph=True) of loss and gradients equals the eager ones."""
    with torch.device("cuda"):
        mixer = build_mixer(MIXERS[kind], 64, 0, 1)
        x = torch.randn(2, 130, 64)
    compiled = torch.compile(lambda x: mixer(x)[0].square().mean(), fullgraph=True)
    want = torch.autograd.grad(mixer(x)[0].square().mean(), list(mixer.parameters()))
    got = torch.autograd.grad(compiled(x), list(mixer.parameters()))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_auto_takes_compiled_rows() -> None:
    """On this device the five ops with CUDA kernels do not fall back."""
    for name in KERNELS:
        module = importlib.import_module(f"seqlib.ops.{name}")
        op = getattr(module, "STEP", module.OP)
        facts = module.OP.facts(**CASES[name][0].inputs(torch.bfloat16, "cuda"))
        assert resolve(op, facts).impl.name in ("native", "triton")
