"""The CUDA kernels without a GPU: run in the emulation against the reference, and compiled by nvcc within their limits.

The emulation compiles the same sources for the host (kernels/cuda/emulate.h). Here its ops stand in for those of the
CPU, so that the whole path from the public function to the gradients runs over the CUDA bindings and kernels.
"""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_ops import CASES, OPS, _close, _run, _widen

from seqlib import native, use_backend
from seqlib.dispatch import Impl, Op
from seqlib.errors import NativeUnavailable
from seqlib.layers.norm import RMSNorm
from seqlib.mixers import build_mixer
from seqlib.mixers.mamba2 import Mamba2Config
from seqlib.ops.case import Case
from seqlib.sequence import SequenceInfo

KERNELS = {
    "causal_conv1d": ("causal_conv1d", "causal_conv1d_bwd", "causal_conv1d_step"),
    "delta_rule": ("delta_rule_step",),
    "linear": ("linear",),
    "linear_attention": ("linear_attention_step",),
    "linear_scan": ("linear_scan", "linear_scan_bwd"),
    "mamba2_step": ("mamba2_step",),
    "selective_scan": ("selective_scan", "selective_scan_bwd", "selective_scan_step"),
    "ssm_kernel": ("cauchy", "cauchy_bwd", "vandermonde"),
}
SEGMENTS = ("selective_scan.segments", "selective_scan_bwd.segments", "linear_scan.segments")


def _cuda_row(op: Op) -> Impl:
    return next(impl for impl in op.impls if impl.name == "native" and "cuda" in impl.devices)


@pytest.fixture
def tune(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Let CPU tensors go through the CUDA kernels, in memory that holds NaN; returns what sets their launch plans."""
    reason = native.why_unavailable("emulated")
    if reason:
        pytest.skip(f"no emulation: {reason}")
    native.load("cpu")  # holds the schemas
    emulated = torch.ops.seqlib_emulated
    library = torch.library.Library("seqlib", "IMPL", "CPU")
    for name in [kernel for kernels in KERNELS.values() for kernel in kernels]:
        library.impl(name, getattr(emulated, name).default, allow_override=True)
    monkeypatch.setattr(SequenceInfo, "plan", lambda seq, device: seq.links)
    choose = Op.choose

    def cuda_row(op: Op, facts: Any, form: str = "auto", backend: str = "auto") -> Any:
        if backend != "native":
            return choose(op, facts, form, backend)
        module, _, function = _cuda_row(op).target.partition(":")
        return getattr(importlib.import_module(module), function)

    monkeypatch.setattr(Op, "choose", cuda_row)
    torch.use_deterministic_algorithms(True)  # fills fresh memory, see conftest
    used: set[str] = set()

    def set_plan(**plan: int) -> None:
        for key, value in plan.items():
            used.add(key)
            emulated.cuda_tune(key, value)

    yield set_plan
    torch.use_deterministic_algorithms(False)
    for key in used:
        emulated.cuda_tune(key, 0)
    library._destroy()


def _grid() -> Iterator[Any]:
    for name, op in OPS.items():
        if any("cuda" in impl.devices and impl.name == "native" for impl in op.impls):
            for i, case in enumerate(case for case in CASES[name] if not case.bench):
                for dtype in (torch.float32, (torch.bfloat16, torch.float16)[i % 2]):
                    yield pytest.param(op, case, dtype, id=f"{name}-{case.name}-{str(dtype)[6:]}")


@pytest.mark.parametrize(("op", "case", "dtype"), list(_grid()))
def test_emulated_row_equals_reference(op: Op, case: Case, dtype: torch.dtype, tune) -> None:
    """Outputs and gradients agree, also with the sequence split; the order of threads and blocks changes no bit."""
    row = _cuda_row(op)
    inputs = case.inputs(dtype, requires_grad=row.grad)
    facts = op.facts(**inputs)
    if refused := ", ".join(row.refuses & facts.features) or (row.limits and row.limits(facts)):
        pytest.skip(f"outside this row: {refused}")
    exact = torch.float64 if dtype == torch.float32 else torch.float32
    want, want_grads = _run(op, {k: _widen(v, exact) for k, v in inputs.items()}, "reference", "reference")
    for segments in (1, 3):
        tune(**dict.fromkeys(SEGMENTS, segments))
        tune(**{"emulation.backwards": 0})
        got, got_grads = _run(op, inputs, row.form, "native")
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            _close(f"output {i}", a, b, dtype, gradient=False, parts=max(1, len(op.parts)))
        assert got_grads.keys() == (want_grads.keys() if row.grad else set())
        for k in got_grads:
            _close(f"gradient of {k}", got_grads[k], want_grads[k], dtype, gradient=True)
        tune(**{"emulation.backwards": 1})
        again, again_grads = _run(op, inputs, row.form, "native")
        assert all(map(_same, got, again)), "outputs depend on the order of threads"
        assert all(_same(got_grads[k], again_grads[k]) for k in got_grads), "gradients depend on it"


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """The same bits, and NaN at the same places: decays at their ends leave some in the reference, too."""
    a, b = (torch.view_as_real(t) if t.is_complex() else t for t in (a, b))
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize(
    ("d_state", "lanes"), [(16, 2), (16, 4), (16, 8), (11, 16), (24, 0), (64, 0), (130, 0), (256, 0)]
)
def test_every_layout_of_the_selective_scan(d_state: int, lanes: int, tune) -> None:
    """Each division of states over lanes agrees with the reference, over several tiles, a document start and a pad."""
    op = OPS["selective_scan"]
    g = torch.Generator().manual_seed(0)
    batch, seqlen, d = 2, 70, 9
    draws = {"x": (batch, seqlen, d), "dt": (batch, seqlen, d), "z": (batch, seqlen, d), "D": (d,), "dt_bias": (d,)}
    inputs: dict[str, Any] = {k: torch.randn(*s, generator=g) for k, s in draws.items()}
    inputs |= {k: torch.randn(batch, seqlen, d_state, generator=g) * d_state**-0.5 for k in "BC"}
    inputs["A"] = -torch.rand(d, d_state, generator=g) * 4 - 0.1
    inputs["initial_state"] = torch.randn(batch, d, d_state, generator=g)
    inputs = {k: v.requires_grad_() for k, v in inputs.items()}
    starts, mask = torch.zeros(batch, seqlen, dtype=torch.bool), torch.ones(batch, seqlen, dtype=torch.bool)
    starts[0, 40], mask[1, [3, 33, 69]] = True, False
    inputs |= {"seq": SequenceInfo(starts=starts, padding_mask=mask), "dt_softplus": True}
    want, want_grads = _run(op, {k: _widen(v, torch.float64) for k, v in inputs.items()}, "reference", "reference")
    tune(**{"selective_scan.lanes": lanes})
    got, got_grads = _run(op, inputs, "chunked", "native")
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        _close(f"output {i}", a, b, torch.float32, gradient=False)
    for k in want_grads:
        _close(f"gradient of {k}", got_grads[k], want_grads[k], torch.float32, gradient=True)


def test_convolution_walks_past_its_blocks(tune) -> None:
    """Windows, gradients and states cross the walks of 32 and the blocks of 128 positions, through pads."""
    op = OPS["causal_conv1d"]
    g = torch.Generator().manual_seed(0)
    starts, mask = torch.zeros(2, 300, dtype=torch.bool), torch.rand(2, 300, generator=g) < 0.8
    starts[0, [31, 32, 130, 256]], mask[1, 20:200] = True, False
    for d_conv in (2, 3, 7):
        inputs: dict[str, Any] = {
            "x": torch.randn(2, 300, 130, generator=g),
            "weight": torch.randn(130, d_conv, generator=g),
            "bias": torch.randn(130, generator=g),
            "initial_state": torch.randn(2, d_conv - 1, 130, generator=g),
        }
        inputs = {k: v.requires_grad_() for k, v in inputs.items()}
        inputs |= {"activation": "silu", "seq": SequenceInfo(starts=starts, padding_mask=mask)}
        want, want_grads = _run(op, {k: _widen(v, torch.float64) for k, v in inputs.items()}, "reference", "reference")
        got, got_grads = _run(op, inputs, "parallel", "native")
        for a, b in zip(got, want, strict=True):
            _close(f"d_conv {d_conv}", a, b, torch.float32, gradient=False)
        for k in want_grads:
            _close(f"gradient of {k}, d_conv {d_conv}", got_grads[k], want_grads[k], torch.float32, gradient=True)


@pytest.mark.parametrize(("rank", "lead", "n"), [(2, (), 5), (1, (3,), 260)])
def test_cauchy_sums(rank: int, lead: tuple[int, ...], n: int, tune) -> None:
    """The kernel of S4 and its gradients over the compiled sums equal those of the torch row in float64."""
    torch_impl, cuda_impl = (importlib.import_module(f"seqlib.ops.ssm_kernel.{m}_impl") for m in ("torch", "cuda"))
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.complex128)

    A = torch.complex(-0.5 - torch.rand(3, n, generator=g), torch.pi * torch.arange(n).expand(3, n)).to(
        torch.complex128
    )
    exact = [A, draw(rank, 3, n) / n, draw(3, n), draw(*lead, 3, n) / n, torch.tensor([0.01, 0.1, 0.3]).double()]
    weight = torch.randn(*lead, 3, 70, generator=g, dtype=torch.float64)
    made = []
    for impl, dtype in ((torch_impl, torch.float64), (cuda_impl, torch.float32)):
        leaves = [t.to(dtype.to_complex() if t.is_complex() else dtype).requires_grad_() for t in exact]
        kernel = impl.dplr(*leaves, 70, l_kernel=70)
        made.append([kernel, *torch.autograd.grad((kernel * weight.to(dtype)).sum(), leaves)])
    for name, want, got in zip(("kernel", *"APBC", "dt"), *made):
        _close(name, got.detach(), want.detach(), torch.float32, gradient=True)


def test_powers_far_out(tune) -> None:
    """Angles of a hundred thousand radians keep their digits, over several blocks of rows and of states."""
    cuda_impl = importlib.import_module("seqlib.ops.ssm_kernel.cuda_impl")
    reference = importlib.import_module("seqlib.ops.ssm_kernel.reference")
    A = torch.complex(torch.full((1, 20), -0.5), torch.pi * torch.arange(20.0).expand(1, 20))
    C = torch.ones(2, 1, 20, dtype=torch.cfloat)
    options: dict[str, Any] = {"dt": torch.tensor([1e-3]), "length": 9000, "discretization": "zoh"}
    got = cuda_impl.diag(A, torch.ones(20), C, **options)
    want = reference.diag(A.cdouble(), torch.ones(20).double(), C.cdouble(), **options | {"dt": options["dt"].double()})
    _close("kernel", got, want, torch.float32, gradient=False)


def _steps() -> dict[str, Callable[[Callable[..., torch.Tensor]], dict[str, Any]]]:
    """Arguments of one decoding step by name of the op and of what is special."""

    def scan(draw: Callable[..., torch.Tensor], n: int = 16, **groups: int) -> dict[str, Any]:
        rows = {k: draw(3, 18) for k in ("x", "dt", "z")} | {k: draw(3, *groups.values(), n) for k in "BC"}
        rest = {"A": -draw(18, n).abs().float(), "state": draw(3, 18, n).float(), "D": draw(18), "dt_bias": draw(18)}
        return rows | rest | {"dt_softplus": True}

    def matrix(
        draw: Callable[..., torch.Tensor], decay: tuple[int, ...] | None, n: int = 20, p: int = 36
    ) -> dict[str, Any]:
        made: dict[str, Any] = {"q": draw(2, 2, n), "k": draw(2, 4, n) / n**0.5, "v": draw(2, 4, p)}
        log_decay = None if decay is None else -draw(*decay).abs().float()
        return made | {"log_decay": log_decay, "state": draw(2, 4, n, p).float(), "scale": 0.5}

    def delta(draw: Callable[..., torch.Tensor], *args: Any) -> dict[str, Any]:
        return matrix(draw, *args) | {"beta": draw(2, 4).sigmoid()}

    def conv(draw: Callable[..., torch.Tensor], width: int) -> dict[str, Any]:
        state = draw(3, width - 1, 70)
        return {"x": draw(3, 70), "weight": draw(70, width), "bias": draw(70), "state": state, "activation": "silu"}

    return {
        "selective_scan": scan,
        "selective_scan wide": lambda draw: scan(draw, 150),
        "selective_scan groups": lambda draw: scan(draw, 5, groups=3),
        "linear_attention": lambda draw: matrix(draw, None),
        "linear_attention constant": lambda draw: matrix(draw, (4,)),
        "linear_attention channel": lambda draw: matrix(draw, (2, 4, 20)),
        "delta_rule": lambda draw: delta(draw, None),
        "delta_rule token": lambda draw: delta(draw, (2, 4)),
        "delta_rule channel wide": lambda draw: delta(draw, (2, 4, 256), 256, 70),
        "causal_conv1d": lambda draw: conv(draw, 4),
        "causal_conv1d 1": lambda draw: conv(draw, 1),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("kind", list(_steps()))
def test_emulated_steps_equal_torch(kind: str, dtype: torch.dtype, tune) -> None:
    """A decoding step gives what the torch row gives in float32, and leaves the same state."""
    module = importlib.import_module(f"seqlib.ops.{kind.split(maxsplit=1)[0]}")
    g = torch.Generator().manual_seed(0)
    arguments = _steps()[kind](lambda *shape: torch.randn(*shape, generator=g).to(dtype))
    if kind.startswith("causal_conv1d"):
        wide = {k: _widen(v, torch.float32) for k, v in arguments.items()}
    else:
        wide = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    wide["state"] = wide["state"].detach().clone()
    with torch.no_grad():
        got = module.step(**arguments, backend="native")
        want = module.step(**wide, backend="torch")
    _close("y", got, want, dtype, gradient=False)
    _close("state", arguments["state"], wide["state"], dtype, gradient=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("split", [1, 2, 8])
def test_every_division_of_a_linear_map(split: int, dtype: torch.dtype, tune) -> None:
    """Rows shared by warps, columns that end within a round, and every number of rows of x, in any order of threads."""
    linear = importlib.import_module("seqlib.ops.linear").linear
    g = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(70, 1560, generator=g).to(dtype), torch.randn(70, generator=g).to(dtype)
    tune(**{"linear.split": split})
    for rows, at_once in ((1, 8), (2, 8), (3, 8), (8, 8), (7, 2)):
        tune(**{"linear.rows": at_once})
        x = torch.randn(8, 1600, generator=g).to(dtype)[:rows, :1560]
        tune(**{"emulation.backwards": 0})
        got = linear(x, weight, bias, backend="native")
        _close(
            f"{rows} rows", got, linear(x.float(), weight.float(), bias.float(), backend="torch"), dtype, gradient=False
        )
        tune(**{"emulation.backwards": 1})
        assert torch.equal(got, linear(x, weight, bias, backend="native")), "it depends on the order of threads"


MAMBA2: dict[str, dict[str, Any]] = {
    "defaults": {},
    "groups": {"d_state": 150, "headdim": 36, "d_inner": 216, "ngroups": 3},
    "norm before gate": {"norm_before_gate": True, "ngroups": 2, "bias": True},
    "no norm": {"norm": False, "out_bias": True, "conv_bias": False},
    "limits": {"dt_limit_min": 0.4, "dt_limit_max": 0.9, "D_per_channel": True, "d_conv": 3},
    "width one": {"d_conv": 1, "headdim": 8, "d_state": 130},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", list(MAMBA2))
def test_whole_steps_of_mamba2_equal_its_parts(name: str, dtype: torch.dtype, tune) -> None:
    """Four tokens through the three kernels, within a residual branch and alone, as through the ops in float32."""
    torch.manual_seed(0)
    mixer = build_mixer(Mamba2Config(**({"headdim": 36, "d_state": 20} | MAMBA2[name])), 72).to(dtype)
    norm = RMSNorm(72).to(dtype)
    with torch.no_grad():
        for t in (norm.weight, mixer.D, *([mixer.norm_weight] if mixer.norm_weight is not None else [])):
            t.uniform_(0.5, 1.5)
        for added in (True, False):
            for batch, at_once in ((1, 8), (3, 2)):
                tune(**{"linear.rows": at_once})
                xs = torch.randn(4, batch, 72)
                xs = xs if added else xs.to(dtype)
                with use_backend("torch"):
                    want, exact = _decode(copy.deepcopy(mixer).float(), copy.deepcopy(norm).float(), xs.float(), added)
                with use_backend(mamba2_step="native"):
                    got, state = _decode(mixer, norm, xs, added)
                    tune(**{"emulation.backwards": 1})
                    again, _ = _decode(mixer, norm, xs, added)
                    tune(**{"emulation.backwards": 0})
                assert torch.equal(got, again), "it depends on the order of threads"
                assert got.dtype == xs.dtype
                _close("y", got, want, dtype, gradient=False)
                for a, b in zip(state.tensors(), exact.tensors(), strict=True):
                    _close("state", a, b, dtype, gradient=False)


def _decode(mixer: Any, norm: RMSNorm, xs: torch.Tensor, added: bool) -> tuple[torch.Tensor, Any]:
    """Outputs of steps from an empty state, and the state after them."""
    state = mixer.initial_state(xs.shape[1])
    step = (lambda x: mixer.added_step(x, norm, state)) if added else (lambda x: mixer.step(x, state))
    return torch.stack([step(x)[0] for x in xs]), state


def test_links_name_the_neighbours() -> None:
    """Before and after each token: a place, the edge of the row, the edge of a document, or padding."""
    starts = torch.tensor([[c == "|" for c in "x|xx-|--"]])
    links = SequenceInfo(starts=starts, padding_mask=torch.tensor([[c != "-" for c in "x|xx-|--"]])).links
    assert links is not None
    assert links[0, 0].tolist() == [-1, -2, 1, 2, -3, -2, -3, -3, 5]
    assert links[1, 0].tolist()[:8] == [-2, 2, 3, -2, -3, -1, -3, -3]


# Bytes of spilled registers that a kernel may have, and of stack; a kernel above needs a line here with its reason.
SPILLS, STACK = 64, 256
ALLOWED = {
    "scan_backward": 160,  # most on sm_80; fewer channels in turn would spill less and write more partial sums
    "conv_backwardILi4E": 160,  # sm_80; with two blocks for a processor instead of three nothing, but less at a time
}


def _usage(arch: str) -> dict[str, tuple[int, int, int]]:
    """Registers, bytes spilled and bytes of stack by kernel, from building the whole library for `arch`."""
    folder = native._cache_folder()
    native.build("cuda", folder, (arch,))
    found = {}
    for unit in native._units("cuda", (arch,)):
        if unit.compiler == "nvcc":
            log = native.object_file("cuda", unit, folder).with_suffix(".log").read_text()
            pattern = (
                r"Compiling entry function '(\w+)'.*?(\d+) bytes stack.*?(\d+) bytes spill stores.*?Used (\d+) reg"
            )
            for name, stack, spills, registers in re.findall(pattern, log, re.DOTALL):
                found[name] = (int(registers), int(spills), int(stack))
    return found


@pytest.mark.parametrize("arch", ["sm_90", pytest.param("sm_80", marks=pytest.mark.slow)])
def test_nvcc_keeps_kernels_in_registers(arch: str) -> None:
    """Every CUDA source compiles and links, and no kernel spills more than a few registers."""
    try:
        native._nvcc()
    except NativeUnavailable as error:
        pytest.skip(str(error))
    usage = _usage(arch)
    assert len(usage) > 30, "the logs of nvcc name no kernels; is -Xptxas=-v still passed?"
    for name, (registers, spills, stack) in usage.items():
        allowed = next((limit for kernel, limit in ALLOWED.items() if kernel in name), SPILLS)
        assert spills <= allowed and stack <= STACK, (
            f"{name}: {registers} registers, {spills} spilled, {stack} of stack"
        )
