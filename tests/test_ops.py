"""Every row of every op against its float64 reference, outputs and gradients, on the cases the op names."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from seqlib import native
from seqlib.dispatch import Impl, Op, op_names, resolve
from seqlib.errors import BackendUnavailable, UnsupportedInput
from seqlib.ops.case import Case, outputs
from seqlib.sequence import State

OPS: dict[str, Op] = {name: importlib.import_module(f"seqlib.ops.{name}").OP for name in op_names()}
CASES: dict[str, tuple[Case, ...]] = {
    name: importlib.import_module(f"seqlib.ops.{name}.cases").CASES for name in op_names()
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16)

# Largest absolute error on outputs of unit scale, and on gradients relative to their largest entry.
ABSOLUTE = {torch.float64: 1e-10, torch.float32: 1e-5}
GRADIENT = {torch.float64: 1e-10, torch.float32: 1e-4}
# Ops whose kernels multiply 16-bit numbers where the machine can.
BF16_OPS = ("linear_attention",)
# Relative RMS error of 16-bit results against the reference on the same rounded inputs.
RMS, RMS_GRADIENT = 6e-3, 1e-2


def _grid():
    for name, op in OPS.items():
        for impl in op.impls:
            for case in CASES[name]:
                for dtype in DTYPES:
                    if (
                        case.bench
                        or (impl.dtypes and dtype not in impl.dtypes)
                        or "cpu" not in (*impl.devices, "cpu")[:1]
                    ):
                        continue
                    if impl.name == "reference" and dtype == torch.float64:
                        continue
                    if impl.needs == ("native",):
                        for isa in ("avx512bf16", "avx512", "avx2", "portable"):
                            if isa == "avx512bf16" and (dtype != torch.bfloat16 or name not in BF16_OPS):
                                continue
                            yield pytest.param(
                                op, impl, case, dtype, isa, id=f"{name}-{impl.name}-{case.name}-{_short(dtype)}-{isa}"
                            )
                    else:
                        yield pytest.param(
                            op,
                            impl,
                            case,
                            dtype,
                            None,
                            id=f"{name}-{impl.name}-{impl.form}-{case.name}-{_short(dtype)}",
                        )


def _widen(value: Any, exact: torch.dtype) -> Any:
    """A leaf with the same numbers in the reference's precision; what is not a number stays as it is."""
    if not isinstance(value, torch.Tensor) or not (value.is_floating_point() or value.is_complex()):
        return value
    return value.detach().to(torch.complex128 if value.is_complex() else exact).requires_grad_()


def _leaves(inputs: dict) -> dict[str, torch.Tensor]:
    """Every tensor that wants a gradient, those inside states included."""
    named = {k: list(v.tensors()) if isinstance(v, State) else [v] for k, v in inputs.items()}
    flat = {k if len(ts) == 1 else f"{k}.{i}": t for k, ts in named.items() for i, t in enumerate(ts)}
    return {k: t for k, t in flat.items() if isinstance(t, torch.Tensor) and t.requires_grad}


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _run(op: Op, inputs: dict, form: str, backend: str) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Outputs, and the gradients of a fixed random combination of them with respect to every tensor input."""
    function = getattr(importlib.import_module(f"seqlib.ops.{op.name}"), op.function)
    made = outputs(function(**inputs, form=form, backend=backend))
    smooth = [t for t in made if t.requires_grad]
    leaves = _leaves(inputs)
    g = torch.Generator().manual_seed(1)
    loss = sum(
        ((t * torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.device, t.dtype)).real.sum() for t in smooth),
        torch.zeros(()),
    )
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True) if smooth else []
    return [t.detach() for t in made], {k: g for k, g in zip(leaves, grads) if g is not None}


def _close(name: str, got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype, *, gradient: bool) -> None:
    assert got.shape == want.shape, name
    if not want.numel():
        return
    assert bool(torch.isfinite(got.abs()).all()), f"{name} has NaN or Inf"
    wide = torch.complex128 if want.is_complex() else torch.float64
    got, want = got.to(wide), want.to(wide)
    error = (got - want).abs()
    if dtype in ABSOLUTE:
        scale = max(1.0, float(want.abs().max()))
        bound = (GRADIENT if gradient else ABSOLUTE)[dtype]
        assert float(error.max()) <= bound * scale, f"{name}: {float(error.max())}"
    else:
        bound = RMS_GRADIENT if gradient else RMS
        assert float(error.square().mean().sqrt()) <= bound * float(want.abs().square().mean().sqrt()) + 1e-7, name


def compare(op: Op, impl: Impl, inputs: dict, dtype: torch.dtype) -> None:
    """Outputs and gradients of a row against the reference on the same inputs."""
    # 16-bit: the reference sees the same rounded numbers in float32, parameters as they are.
    exact = torch.float32 if dtype in (torch.bfloat16, torch.float16) else torch.float64
    truth = {
        k: v.map(lambda t: _widen(t, exact)) if isinstance(v, State) else _widen(v, exact) for k, v in inputs.items()
    }
    got, got_grads = _run(op, inputs, impl.form, impl.name)
    want, want_grads = _run(op, truth, "reference", "reference")
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want)):
        _close(f"output {i}", a, b, dtype, gradient=False)
    assert got_grads.keys() == (want_grads.keys() if impl.grad else set())
    for k in got_grads:
        _close(f"gradient of {k}", got_grads[k], want_grads[k], dtype, gradient=True)


@pytest.fixture
def isa(request):
    """Run the native kernels in one instruction set."""
    wanted = request.param
    if wanted is None:
        yield
        return
    reason = native.why_unavailable("cpu")
    if reason:
        pytest.skip(f"no native library: {reason}")
    before = torch.ops.seqlib.isa(None)
    try:
        torch.ops.seqlib.isa(wanted)
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])
    yield
    torch.ops.seqlib.isa(before)


@pytest.mark.parametrize(("op", "impl", "case", "dtype", "isa"), list(_grid()), indirect=["isa"])
def test_row_equals_reference(op: Op, impl: Impl, case: Case, dtype: torch.dtype, isa) -> None:
    inputs = case.inputs(dtype, requires_grad=impl.grad)
    try:
        resolve(op, op.facts(**inputs), impl.form, impl.name)
    except BackendUnavailable as error:
        assert impl.limits or impl.refuses, str(error)
        pytest.skip(f"outside this row: {error}")
    compare(op, impl, inputs, dtype)


def _divided():
    """Native rows and cases that are large enough to be divided among threads."""
    for name, op in OPS.items():
        for impl in op.impls:
            if impl.needs == ("native",):
                for case in CASES[name]:
                    if case.bench:
                        yield pytest.param(op, impl, case, id=f"{name}-{impl.form}-{case.name}")


@pytest.mark.native
@pytest.mark.parametrize(("op", "impl", "case"), list(_divided()))
def test_who_takes_which_ticket_does_not_matter(op: Op, impl: Impl, case: Case) -> None:
    """Threads take work as they are free: three give the same bits every time, and one thread's results."""
    reason = native.why_unavailable("cpu")
    if reason:
        pytest.skip(f"no native library: {reason}")
    inputs = case.inputs(torch.float32, requires_grad=impl.grad)
    try:
        resolve(op, op.facts(**inputs), impl.form, impl.name)
    except BackendUnavailable as error:
        pytest.skip(f"outside this row: {error}")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone, alone_grads = _run(op, inputs, impl.form, impl.name)
        torch.set_num_threads(3)
        first, *others = [_run(op, inputs, impl.form, impl.name) for _ in range(4)]
    finally:
        torch.set_num_threads(before)
    for made, grads in others:
        assert all(torch.equal(a, b) for a, b in zip(made, first[0]))
        assert all(torch.equal(grads[name], first[1][name]) for name in grads)
    for i, (got, want) in enumerate(zip(first[0], alone)):
        _close(f"output {i}", got, want, torch.float32, gradient=False)
    for name, want in alone_grads.items():
        _close(f"gradient of {name}", first[1][name], want, torch.float32, gradient=True)


@pytest.mark.parametrize("name", list(OPS))
def test_auto_takes_every_case(name: str) -> None:
    """`auto` finds a row for every case in every dtype, with and without gradients."""
    for case in CASES[name]:
        if not case.bench:
            for dtype in DTYPES:
                resolve(OPS[name], OPS[name].facts(**case.inputs(dtype, requires_grad=True)))


@pytest.mark.parametrize("op", ["selective_scan", "linear_attention", "delta_rule", "linear_scan", "causal_conv1d"])
def test_empty_batches_are_refused(op: str) -> None:
    inputs = CASES[op][0].inputs(torch.float32)
    few = {k: t[:0] if isinstance(t, torch.Tensor) and k not in ("A", "D", "dt_bias", "weight") else t
           for k, t in inputs.items()}  # fmt: skip
    with pytest.raises(UnsupportedInput, match="empty|none of them 0"):
        getattr(importlib.import_module(f"seqlib.ops.{op}"), op)(**few)


def _padded():
    for name, op in OPS.items():
        for impl in op.impls:
            for case in CASES[name]:
                if "padded" in case.name and impl.name != "reference" and "cpu" in (*impl.devices, "cpu")[:1]:
                    yield pytest.param(op, impl, case, id=f"{name}-{impl.name}-{impl.form}-{case.name}")


@pytest.mark.parametrize(("op", "impl", "case"), list(_padded()))
def test_what_stands_at_padded_positions_does_not_matter(op: Op, impl: Impl, case: Case) -> None:
    """NaN there changes no output and no gradient elsewhere."""
    inputs = case.inputs(torch.float32, requires_grad=impl.grad)
    try:
        resolve(op, op.facts(**inputs), impl.form, impl.name)
    except BackendUnavailable as error:
        pytest.skip(f"outside this row: {error}")
    real = inputs["seq"].padding_mask
    poisoned = dict(inputs)
    for name, t in inputs.items():
        if isinstance(t, torch.Tensor) and t.shape[:2] == real.shape:
            holes = ~real.view(*real.shape, *[1] * (t.dim() - 2))
            poisoned[name] = t.detach().masked_fill(holes, torch.nan).requires_grad_(t.requires_grad)
    (want, want_grads), (got, got_grads) = (_run(op, x, impl.form, impl.name) for x in (inputs, poisoned))
    for a, b in zip(got, want):
        _close("output", a, b, torch.float32, gradient=False)
    for name, grad in got_grads.items():
        rows = real if grad.shape[:2] == real.shape else ...
        _close(name, grad[rows], want_grads[name][rows], torch.float32, gradient=True)
