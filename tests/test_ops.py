"""Every row of every op against its float64 reference, outputs and gradients, on the cases the op names."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from seqlib import native
from seqlib.dispatch import Impl, Op, op_names, resolve
from seqlib.errors import BackendUnavailable, UnsupportedInput
from seqlib.ops.case import Case, outputs
from seqlib.sequence import SequenceInfo, State

OPS: dict[str, Op] = {name: importlib.import_module(f"seqlib.ops.{name}").OP for name in op_names()}
CASES: dict[str, tuple[Case, ...]] = {
    name: importlib.import_module(f"seqlib.ops.{name}.cases").CASES for name in op_names()
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16)

# Largest absolute error on outputs of unit scale, and on gradients relative to their largest entry.
ABSOLUTE = {torch.float64: 1e-10, torch.float32: 1e-5}
GRADIENT = {torch.float64: 1e-10, torch.float32: 1e-4}
# Compiled rows, whatever their instruction set: float32 gradients relative to their own largest entry, however small.
NATIVE_GRADIENT = 4e-6
# Ops whose kernels multiply 16-bit numbers where the machine can.
BF16_OPS = ("linear_attention",)
# Relative RMS error of 16-bit results against the reference on the same rounded inputs.
RMS, RMS_GRADIENT = 6e-3, 1e-2


def _rows(keep: Callable[[Case], bool], dtypes: tuple[torch.dtype, ...] = DTYPES, loops: tuple = DTYPES) -> Iterator:
    """Every row that runs on a CPU with every case that is kept: native ones in each instruction set and each dtype of
    `loops`, others in each of `dtypes`."""
    for name, op in OPS.items():
        for impl in op.impls:
            native = impl.needs == ("native",)
            for case in CASES[name]:
                for dtype in loops if native else dtypes:
                    if case.bench or not keep(case) or (impl.dtypes and dtype not in impl.dtypes):
                        continue
                    if "cpu" not in (*impl.devices, "cpu")[:1] or (impl.name, dtype) == ("reference", torch.float64):
                        continue
                    for isa in ("avx512bf16", "avx512", "avx2", "portable") if native else (None,):
                        if isa == "avx512bf16" and (dtype != torch.bfloat16 or name not in BF16_OPS):
                            continue
                        tags = (name, impl.name, None if native else impl.form, case.name, _short(dtype), isa)
                        yield pytest.param(op, impl, case, dtype, isa, id="-".join(filter(None, tags)))


def _widen(value: Any, exact: torch.dtype) -> Any:
    """A leaf with the same numbers in the reference's precision; what is not a number stays as it is."""
    if isinstance(value, list):
        return [_widen(part, exact) for part in value]
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
        return value
    return value.detach().to(torch.complex128 if value.is_complex() else exact).requires_grad_()


def _leaves(inputs: dict) -> dict[str, Tensor]:
    """Every tensor that wants a gradient, those inside states included."""
    named = {
        k: list(v.tensors()) if isinstance(v, State) else v if isinstance(v, list) else [v] for k, v in inputs.items()
    }
    flat = {k if len(ts) == 1 else f"{k}.{i}": t for k, ts in named.items() for i, t in enumerate(ts)}
    return {k: t for k, t in flat.items() if isinstance(t, Tensor) and t.requires_grad}


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _run(
    op: Op, inputs: dict, form: str, backend: str, *, around: AbstractContextManager | None = None
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs with what the op wrote, and the gradients of a fixed random combination with respect to every input."""
    function = getattr(importlib.import_module(f"seqlib.ops.{op.name}"), op.function)
    inputs = inputs | {name: inputs[name].detach().clone() for name in op.writes}
    with around or nullcontext():
        made = outputs(function(**inputs, form=form, backend=backend)) + [inputs[name] for name in op.writes]
    smooth = [t for t in made if t.requires_grad]
    leaves = _leaves(inputs)
    g = torch.Generator().manual_seed(1)
    loss = sum(
        ((t * torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.device, t.dtype)).real.sum() for t in smooth),
        torch.zeros(()),
    )
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True) if smooth else []
    return [t.detach() for t in made], {k: g for k, g in zip(leaves, grads) if g is not None}


def _close(
    name: str,
    got: Tensor,
    want: Tensor,
    dtype: torch.dtype,
    *,
    gradient: bool,
    parts: int = 1,
    native_row: bool = False,
) -> None:
    """`parts`: 16-bit numbers are rounded behind each of so many ops, whose errors add up in squares."""
    assert got.shape == want.shape, name
    if not want.numel():
        return
    known = want.abs().isfinite()
    assert bool(got.abs().isfinite()[known].all()), f"{name} has NaN or Inf"
    assert bool(known.any()), f"{name} is nowhere finite in the reference"
    got, want = got[known], want[known]
    wide = torch.complex128 if want.is_complex() else torch.float64
    got, want = got.to(wide), want.to(wide)
    error = (got - want).abs()
    if native_row and gradient and dtype == torch.float32:
        assert float(error.max()) <= NATIVE_GRADIENT * float(want.abs().max()), f"{name}: {float(error.max())}"
    elif dtype in ABSOLUTE:
        scale = max(1.0, float(want.abs().max()))
        bound = (GRADIENT if gradient else ABSOLUTE)[dtype]
        assert float(error.max()) <= bound * scale, f"{name}: {float(error.max())}"
    else:
        bound = (RMS_GRADIENT if gradient else RMS) * parts**0.5
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
        _close(f"output {i}", a, b, dtype, gradient=False, parts=max(1, len(op.parts)))
    assert got_grads.keys() == (want_grads.keys() if impl.grad else set())
    for k in got_grads:
        _close(
            f"gradient of {k}", got_grads[k], want_grads[k], dtype, gradient=True, native_row=impl.needs == ("native",)
        )


@pytest.mark.parametrize(("op", "impl", "case", "dtype", "isa"), list(_rows(lambda case: True)), indirect=["isa"])
def test_row_equals_reference(op: Op, impl: Impl, case: Case, dtype: torch.dtype, isa) -> None:
    inputs = case.inputs(dtype, requires_grad=impl.grad)
    try:
        resolve(op, op.facts(**inputs), impl.form, impl.name)
    except BackendUnavailable as error:
        assert impl.limits or impl.refuses, str(error)
        pytest.skip(f"outside this row: {error}")
    compare(op, impl, inputs, dtype)


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"], indirect=True)
@pytest.mark.parametrize("strength", [0.01, 1.0, 8.0, 15.0])
@pytest.mark.parametrize(
    ("name", "kind"),
    [("linear_attention", "head"), *((n, k) for n in ("linear_attention", "delta_rule") for k in ("token", "channel"))],
)
def test_what_strong_decays_leave_is_not_rounded_away(name: str, kind: str, strength: float, isa) -> None:
    """The gradient of a decay of e^-15 is as small as that, beside terms of size 1 that it does not scale."""
    case = importlib.import_module(f"seqlib.ops.{name}.cases").case
    inputs = case("strong", 2, 150, 2, 20, 36, kind, state=True).inputs(torch.float32)
    g = torch.Generator().manual_seed(0)
    inputs["log_decay"] = -strength * (1 + torch.rand(inputs["log_decay"].shape, generator=g) / 2)
    inputs = {k: v.requires_grad_() for k, v in inputs.items()}
    compare(OPS[name], next(i for i in OPS[name].impls if i.name == "native"), inputs, torch.float32)


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
    """`auto` finds a row for every case in every dtype, with gradients unless it writes into its arguments."""
    for case in CASES[name]:
        if not case.bench:
            for dtype in DTYPES:
                resolve(OPS[name], OPS[name].facts(**case.inputs(dtype, requires_grad=not OPS[name].writes)))


@pytest.mark.parametrize("op", ["selective_scan", "linear_attention", "delta_rule", "linear_scan", "causal_conv1d"])
def test_empty_batches_are_refused(op: str) -> None:
    inputs = CASES[op][0].inputs(torch.float32)
    few = {k: t[:0] if isinstance(t, Tensor) and k not in ("A", "D", "dt_bias", "weight") else t
           for k, t in inputs.items()}  # fmt: skip
    with pytest.raises(UnsupportedInput, match="empty|none of them 0"):
        getattr(importlib.import_module(f"seqlib.ops.{op}"), op)(**few)


def _has_padding(case: Case) -> bool:
    seq = case.inputs(torch.float32).get("seq")
    return seq is not None and seq.padding_mask is not None


def _has_documents(case: Case) -> bool:
    seq = case.inputs(torch.float32).get("seq")
    return seq is not None and seq.starts is not None


@pytest.mark.parametrize(
    ("op", "impl", "case", "dtype", "isa"),
    list(_rows(_has_padding, (torch.float32,), (torch.float32, torch.bfloat16))),
    indirect=["isa"],
)
def test_what_stands_at_padded_positions_does_not_matter(
    op: Op, impl: Impl, case: Case, dtype: torch.dtype, isa
) -> None:
    """NaN there changes no output and no gradient elsewhere."""
    inputs = case.inputs(dtype, requires_grad=impl.grad)
    try:
        resolve(op, op.facts(**inputs), impl.form, impl.name)
    except BackendUnavailable as error:
        pytest.skip(f"outside this row: {error}")
    real = inputs["seq"].padding_mask
    poisoned = dict(inputs)
    for name, t in inputs.items():
        if isinstance(t, Tensor) and t.shape[:2] == real.shape:
            holes = ~real.view(*real.shape, *[1] * (t.dim() - 2))
            poisoned[name] = t.detach().masked_fill(holes, torch.nan).requires_grad_(t.requires_grad)
    (want, want_grads), (got, got_grads) = (_run(op, x, impl.form, impl.name) for x in (inputs, poisoned))
    for a, b in zip(got, want):
        _close("output", a, b, dtype, gradient=False)
    for name, grad in got_grads.items():
        rows = real if grad.shape[:2] == real.shape else ...
        _close(name, grad[rows], want_grads[name][rows], dtype, gradient=True)


def _parity(seq: SequenceInfo, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Whether documents are odd ones: of each position, and of the state that enters and that leaves each row."""
    ids = seq.document_ids
    assert ids is not None
    real = torch.ones_like(ids, dtype=torch.bool) if seq.padding_mask is None else seq.padding_mask
    first = ids.gather(1, real.long().argmax(1, keepdim=True))[:, 0]
    entering, leaving = (ids[:, -1], first) if reverse else (torch.zeros_like(first), ids[:, -1])
    return ids % 2 == 1, entering % 2 == 1, leaving % 2 == 1


def _fill(t: Tensor, where: Tensor, value: float) -> Tensor:
    """t with `value` where a mask of its first axes says so."""
    filled = t.detach().masked_fill(where.view(*where.shape, *[1] * (t.dim() - where.dim())), value)
    return filled.requires_grad_(t.requires_grad)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    ("op", "impl", "case", "dtype", "isa"),
    list(_rows(_has_documents, (torch.float32,), (torch.float32, torch.bfloat16))),
    indirect=["isa"],
)
def test_a_document_start_forgets_whatever_came_before(
    op: Op, impl: Impl, case: Case, dtype: torch.dtype, isa, poison: float
) -> None:
    """NaN or infinity in every second document, and in the state, changes nothing and no gradient of the others."""
    inputs = case.inputs(dtype, requires_grad=impl.grad)
    try:
        resolve(op, op.facts(**inputs), impl.form, impl.name)
    except BackendUnavailable as error:
        pytest.skip(f"outside this row: {error}")
    seq = inputs["seq"]
    of_token, entering, leaving = _parity(seq, inputs.get("reverse", False))
    function = getattr(importlib.import_module(f"seqlib.ops.{op.name}"), op.function)

    def run(given: dict, clean: Tensor, kept: Tensor) -> list[Tensor]:
        """Outputs and gradients of the clean documents, zeros elsewhere."""
        made = outputs(function(**given, form=impl.form, backend=impl.name))
        made = [t if t.dtype == torch.long else t.where(_like(w, t), 0) for t, w in zip(made, [clean, *[kept] * 9])]
        leaves = [t for v in given.values() for t in (v.tensors() if isinstance(v, State) else [v])]
        leaves = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
        if not leaves:
            return made
        g = torch.Generator().manual_seed(1)
        loss = sum((t * torch.randn(t.shape, generator=g).to(t.dtype)).real.sum() for t in made if t.requires_grad)
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        grads = [d.where(_like(clean, d), 0) for d in grads if d is not None and d.shape[:2] == clean.shape]
        return [*made, *grads]

    def _like(mask: Tensor, t: Tensor) -> Tensor:
        return mask.view(*mask.shape, *[1] * (t.dim() - mask.dim()))

    for odd in (True, False):
        poisoned = {}
        for name, t in inputs.items():
            if isinstance(t, Tensor) and t.shape[:2] == of_token.shape:
                value = -poison if name == "log_decay" else poison  # which is at most 0
                poisoned[name] = _fill(t, of_token == odd, value)
            elif isinstance(t, State):
                where = entering == odd
                poisoned[name] = t.map(lambda s, w=where: s if s.dtype == torch.long else _fill(s, w, poison))
            elif isinstance(t, Tensor) and name == "initial_state":
                poisoned[name] = _fill(t, entering == odd, poison)
            else:
                poisoned[name] = t
        clean, kept = of_token != odd, leaving != odd
        if seq.padding_mask is not None:
            clean = clean & seq.padding_mask
        for want, got in zip(run(inputs, clean, kept), run(poisoned, clean, kept), strict=True):
            known = want.isfinite()  # decays at their ends have no gradient in some places
            torch.testing.assert_close(got[known], want[known], rtol=1e-5, atol=1e-5)


SUMMARIES = {
    "linear_attention": ("k", "v", "log_decay"),
    "delta_rule": ("k", "v", "beta", "log_decay"),
    "linear_scan": ("a", "b"),
    "selective_scan": ("x", "dt", "A", "B"),
}


@pytest.mark.parametrize("name", SUMMARIES)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_summaries_forget_at_a_document_start(name: str, poison: float) -> None:
    """A start in the second of two spans makes the summary of both what it is without the poison before it."""
    module = importlib.import_module(f"seqlib.ops.{name}")
    inputs = next(c for c in CASES[name] if c.name in ("packed", "token_packed")).inputs(torch.float32)
    given = {k: inputs[k] for k in SUMMARIES[name]}
    seqlen = inputs["seq"].shape[1]
    starts = (torch.arange(seqlen) == seqlen // 2 + 3)[None]

    def joined(given: dict) -> list[Tensor]:
        spans = [slice(0, seqlen // 2), slice(seqlen // 2, seqlen)]
        cut = [{k: t if name == "selective_scan" and k == "A" else t[:, at] for k, t in given.items()} for at in spans]
        halves = [module.summarize(**c, seq=SequenceInfo(starts[:, at])) for c, at in zip(cut, spans)]
        return outputs(module.combine(*halves))

    before = starts.cumsum(1) == 0
    poisoned = {
        k: t if t.shape[:2] != before.shape else _fill(t, before, -poison if k == "log_decay" else poison)
        for k, t in given.items()
    }
    for want, got in zip(joined(given), joined(poisoned), strict=True):
        torch.testing.assert_close(got, want)


def _steps():
    for name, op in OPS.items():
        module = importlib.import_module(f"seqlib.ops.{name}")
        rows = {i.name: i for i in getattr(module, "STEP_IMPLS", ())} if hasattr(module, "step") else {}
        for case in CASES[name]:
            if not case.name.endswith("_ends") and case.name != "ends":
                continue
            inputs = case.inputs(torch.float32)
            if "seq" in inputs or not {"initial_state", "state"} & inputs.keys():
                continue
            for backend in rows or (["only"] if hasattr(module, "step") else []):
                for isa in ("avx512", "avx2", "portable") if backend == "native" else (None,):
                    yield pytest.param(
                        op, backend, case, isa, id="-".join(filter(None, (name, backend, case.name, isa)))
                    )


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("op", "backend", "case", "isa"), list(_steps()), indirect=["isa"])
def test_steps_at_the_ends_of_decays(op: Op, backend: str, case: Case, isa, autocast: bool) -> None:
    """Every row of every step, token by token, against the reference of the whole sequence; also inside autocast."""
    module = importlib.import_module(f"seqlib.ops.{op.name}")
    inputs = case.inputs(torch.float32)
    wide = {k: v.map(lambda t: _widen(t, torch.float64)) if isinstance(v, State) else _widen(v, torch.float64)
            for k, v in inputs.items()}  # fmt: skip
    want = outputs(getattr(module, op.function)(**wide, form="reference", backend="reference"))[0].detach()
    inputs.pop("chunk_size", None)
    given = inputs.pop("initial_state", None)
    state = given.clone() if given is not None else inputs.pop("state")
    if isinstance(state, State) and "window" not in inputs:
        state = state.reserve(int(state.length.max()) + want.shape[1])
    known = {} if backend == "only" else {"backend": backend}
    for t in range(min(want.shape[1], 24)):
        now = {k: v[:, t] if isinstance(v, Tensor) and v.shape[:2] == want.shape[:2] else v for k, v in inputs.items()}
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = module.step(**now, state=state, **known)
        except BackendUnavailable as error:
            pytest.skip(f"outside this row: {error}")
        _close(f"y at {t}", y, want[:, t], torch.float32, gradient=False)


def _plain_rows():
    for name, op in OPS.items():
        for impl in op.impls:
            for case in CASES[name]:
                if not case.bench and "cpu" in (*impl.devices, "cpu")[:1]:
                    yield pytest.param(op, impl, case, id=f"{name}-{impl.name}-{impl.form}-{case.name}")


@pytest.mark.parametrize(("op", "impl", "case"), list(_plain_rows()))
def test_autocast_around_an_op_changes_nothing(op: Op, impl: Impl, case: Case) -> None:
    """Dtypes and every bit of the results are those without it, and of gradients, which torch wants taken outside."""
    inputs = case.inputs(torch.float32, requires_grad=impl.grad)
    try:
        resolve(op, op.facts(**inputs), impl.form, impl.name)
    except BackendUnavailable as error:
        pytest.skip(f"outside this row: {error}")
    want, want_grads = _run(op, inputs, impl.form, impl.name)
    around = torch.autocast("cpu", torch.bfloat16)
    got, got_grads = _run(op, inputs, impl.form, impl.name, around=around)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(got_grads, want_grads, rtol=0, atol=0, equal_nan=True)
