"""Laws of the two scans that the equivalence grid does not cover."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from seqlib import native
from seqlib.errors import BackendUnavailable, UnsupportedInput
from seqlib.ops import linear_scan, selective_scan
from seqlib.ops.selective_scan import step
from seqlib.sequence import SequenceInfo

BACKENDS = ("torch", "native")
SCANS = {"linear": importlib.import_module("seqlib.ops.linear_scan"), "selective": inspect.unwrap(step).__globals__}
needs_native = pytest.mark.skipif(native.why_unavailable("cpu") is not None, reason="no native library")


def _inputs(batch: int = 2, seqlen: int = 70, d: int = 20, n: int = 5, **extra: Any) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    return {
        "x": draw(batch, seqlen, d),
        "dt": draw(batch, seqlen, d) - 3,
        "A": -draw(d, n).abs() * 4,
        "B": draw(batch, seqlen, n),
        "C": draw(batch, seqlen, n),
        "D": draw(d),
        "z": draw(batch, seqlen, d),
        "dt_bias": draw(d),
        "dt_softplus": True,
    } | extra


def _cut(inputs: dict[str, Any], begin: int, end: int) -> dict[str, Any]:
    along = ("x", "dt", "B", "C", "z")
    return {k: v[:, begin:end] if k in along else v for k, v in inputs.items()}


def _linear(complex_: bool = False, batch: int = 2, seqlen: int = 70, d: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    dtype = torch.cfloat if complex_ else torch.float32
    a = torch.rand(batch, seqlen, d, generator=g)
    a = torch.polar(a, 3 * torch.rand(batch, seqlen, d, generator=g)) if complex_ else a
    return a, torch.randn(batch, seqlen, d, generator=g, dtype=dtype), torch.randn(batch, d, generator=g, dtype=dtype)


def _same(got: Any, want: Any, tolerance: float = 2e-6) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("at", [1, 31, 32, 45, 69])
def test_split_invariance(backend: str, at: int) -> None:
    """Two calls that hand the state over equal one call."""
    inputs = _inputs(initial_state=torch.randn(2, 20, 5))
    whole = selective_scan(**inputs, backend=backend)
    y0, state = selective_scan(**_cut(inputs, 0, at), backend=backend)
    y1, state = selective_scan(**(_cut(inputs, at, 70) | {"initial_state": state}), backend=backend)
    _same((torch.cat([y0, y1], 1), state), whole)

    for complex_ in (False, True):
        a, b, h = _linear(complex_)
        whole = linear_scan(a, b, initial_state=h, backend=backend)
        y0, state = linear_scan(a[:, :at], b[:, :at], initial_state=h, backend=backend)
        y1, state = linear_scan(a[:, at:], b[:, at:], initial_state=state, backend=backend)
        _same((torch.cat([y0, y1], 1), state), whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_equals_separate(backend: str) -> None:
    lengths = [33, 1, 1, 20, 15]
    inputs = _inputs(batch=1)
    a, b, _ = _linear(batch=1)
    seq = SequenceInfo.packed(lengths)
    packed = selective_scan(**inputs, seq=seq, backend=backend)
    rows = linear_scan(a, b, seq=seq, backend=backend)
    back = linear_scan(a, b, reverse=True, seq=seq, backend=backend)[0]
    begin = 0
    for length in lengths:
        end = begin + length
        alone = selective_scan(**_cut(inputs, begin, end), backend=backend)
        piece = linear_scan(a[:, begin:end], b[:, begin:end], backend=backend)
        last = linear_scan(a[:, begin:end], b[:, begin:end], reverse=True, backend=backend)
        _same((packed[0][:, begin:end], rows[0][:, begin:end], back[:, begin:end]), (alone[0], piece[0], last[0]))
        begin = end
    _same((packed[1], rows[1]), (alone[1], piece[1]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_absent(backend: str, side: str) -> None:
    """Numbers at padded positions change nothing, not even if they are not numbers."""
    mask = torch.ones(2, 70, dtype=torch.bool)
    hidden = slice(0, 37) if side == "left" else slice(33, 70)
    shown = slice(37, 70) if side == "left" else slice(0, 33)
    mask[:, hidden] = False
    seq = SequenceInfo(padding_mask=mask)
    inputs = _inputs(initial_state=torch.randn(2, 20, 5))
    for name in ("x", "dt", "z", "B", "C"):
        inputs[name][:, hidden] = torch.nan
    y, state = selective_scan(**inputs, seq=seq, backend=backend)
    _same((y[:, shown], state), selective_scan(**_cut(inputs, shown.start, shown.stop), backend=backend))
    assert not y[:, hidden].any()

    a, b, h = _linear()
    b[:, hidden] = torch.nan
    y, state = linear_scan(a, b, initial_state=h, seq=seq, backend=backend)
    _same((y[:, shown], state), linear_scan(a[:, shown], b[:, shown], initial_state=h, backend=backend))
    assert not y[:, hidden].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(1, 7, 1), (2, 20, 5), (3, 33, 16), (1, 64, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_equals_scan(backend: str, sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    batch, d, n = sizes
    inputs = _inputs(batch, 6, d, n)
    inputs |= {k: inputs[k].to(dtype) for k in ("x", "dt", "B", "C", "z")}
    start = torch.randn(batch, d, n)
    y, final = selective_scan(**inputs, initial_state=start, backend=backend)
    state, ys = start.clone(), []
    for t in range(6):
        now = {k: v[:, t] if k in ("x", "dt", "B", "C", "z") else v for k, v in inputs.items()}
        ys.append(step(**now, state=state, backend=backend))
    tolerance = 2e-6 if dtype == torch.float32 else 1e-2
    _same((torch.stack(ys, 1), state), (y, final), tolerance)
    assert ys[0].dtype == dtype


@pytest.mark.parametrize("backend", BACKENDS)
def test_step_with_groups(backend: str) -> None:
    inputs = _inputs(2, 1, 24, 5) | {"B": torch.randn(2, 1, 3, 5), "C": torch.randn(2, 1, 3, 5)}
    y, final = selective_scan(**inputs, backend=backend)
    state = torch.zeros(2, 24, 5)
    now = {k: v[:, 0] if k in ("x", "dt", "B", "C", "z") else v for k, v in inputs.items()}
    _same((step(**now, state=state, backend=backend), state), (y[:, 0], final))


def test_gradcheck_of_torch_rows() -> None:
    """First and, for states that are trained through, second derivatives in float64."""
    given = _inputs(1, 5, 4, 3, initial_state=torch.randn(1, 4, 3))
    flag = given.pop("dt_softplus")
    names = list(given)
    leaves = [given[k].double().requires_grad_() for k in names]
    seq = SequenceInfo.packed([2, 3], continues=True)
    assert torch.autograd.gradcheck(
        lambda *t: selective_scan(**dict(zip(names, t)), dt_softplus=flag, seq=seq, backend="torch"), leaves
    )
    for complex_ in (False, True):
        a, b, h = (t.to(torch.complex128 if t.is_complex() else torch.float64) for t in _linear(complex_, 1, 20, 2))
        leaves = [t.requires_grad_() for t in (a, b, h)]
        assert torch.autograd.gradcheck(lambda a, b, h: linear_scan(a, b, initial_state=h, backend="torch"), leaves)


@needs_native
def test_opcheck() -> None:
    g = _inputs(2, 40, 20, 5, initial_state=torch.randn(2, 20, 5))
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[:, :3] = False
    spans = SequenceInfo(padding_mask=mask).spans
    ops = torch.ops.seqlib
    for name in ("linear_scan", "selective_scan"):
        importlib.import_module(f"seqlib.ops.{name}.native_impl")
    plain = [g[k] for k in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")]
    for leaves in (plain, [t.requires_grad_() for t in plain]):
        keep = leaves[0].requires_grad
        torch.library.opcheck(ops.selective_scan.default, (*leaves, None, True, keep))
        bare = (*leaves[:5], None, None, None, None)
        torch.library.opcheck(ops.selective_scan.default, (*bare, None, True, keep))
    plain = [t.detach() for t in plain]
    torch.library.opcheck(ops.selective_scan.default, (*plain, spans, True, False))
    y, final, kept = ops.selective_scan(*plain, None, True, True)
    torch.library.opcheck(
        ops.selective_scan_bwd.default,
        (y, final, *plain, None, kept, True),
        test_utils=("test_schema", "test_faketensor"),
    )
    x, dt, A, B, C, D, z, bias, state = plain
    torch.library.opcheck(
        ops.selective_scan_step.default, (x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], state, D, z[:, 0], bias, True)
    )
    torch.library.opcheck(ops.exp_floor.default, (torch.randn(128), 2), test_utils="test_schema")

    for complex_ in (False, True):
        a, b, h = _linear(complex_)
        torch.library.opcheck(ops.linear_scan.default, (a, b, h, spans if b.shape[1] == 40 else None, True))
        y, final = ops.linear_scan(a, b, h, None, False)
        torch.library.opcheck(
            ops.linear_scan_bwd.default, (b, final, a, y, h, None, False), test_utils=("test_schema", "test_faketensor")
        )
        leaves = tuple(t.requires_grad_() for t in (a[:1, :1].clone(), b.clone(), h.clone()))
        torch.library.opcheck(ops.linear_scan.default, (*leaves, None, False))


@needs_native
def test_rows_of_a_projection_are_read_in_place() -> None:
    """x and z as halves of one tensor and B, C as its slices give what copies give, values and gradients."""
    xz = torch.randn(2, 40, 48, requires_grad=True)
    low = torch.randn(2, 40, 3 + 10, requires_grad=True)
    g = _inputs(2, 40, 24, 5)
    results = []
    for copy in (False, True):
        pieces = [xz[..., :24], xz[..., 24:], low[..., 3:8], low[..., 8:]]
        x, z, B, C = (p.contiguous() for p in pieces) if copy else pieces
        y, h = selective_scan(**(g | {"x": x, "z": z, "B": B, "C": C}), backend="native")
        results.append((y.detach(), h.detach(), *torch.autograd.grad(y.square().sum() + h.sum(), (xz, low))))
    for a, b in zip(*results):
        assert torch.equal(a, b)


@needs_native
def test_memory_kept_for_backward() -> None:
    """One state per 32 steps that go on, none for documents that fit 32 steps, none without gradients."""
    g = _inputs(1, 100, 20, 5)
    given = [g[k] for k in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")]
    scan = torch.ops.seqlib.selective_scan
    short = SequenceInfo.packed([32, 8, 30, 30]).spans
    assert scan(*given, None, None, True, True)[2].shape == (3, 5, 20)
    assert scan(*given, None, short, True, True)[2].shape == (0, 5, 20)
    assert scan(*given, None, None, True, False)[2].numel() == 0


@needs_native
def test_gradients_do_not_depend_on_threads() -> None:
    inputs = _inputs(1, 130, 200, 17)
    leaves = [t.requires_grad_() for t in inputs.values() if isinstance(t, Tensor)]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y, h = selective_scan(**inputs, backend="native")
            found.append((y, h, *torch.autograd.grad(y.square().sum() + h.sum(), leaves)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


@needs_native
def test_compiles_into_one_graph() -> None:
    inputs = _inputs()
    a, b, h = _linear()

    def both(x: Tensor, a: Tensor) -> tuple[Tensor, ...]:
        return (*selective_scan(**(inputs | {"x": x})), *linear_scan(a, b, initial_state=h))

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    leaves = [inputs["x"].clone().requires_grad_(), a.clone().requires_grad_()]
    want, got = both(*leaves), compiled(*leaves)
    _same(got, want)
    _same(*(torch.autograd.grad(sum(t.square().sum() for t in out), leaves) for out in (got, want)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_not_modified(backend: str) -> None:
    inputs = _inputs(initial_state=torch.randn(2, 20, 5))
    before = {k: v.clone() for k, v in inputs.items() if isinstance(v, Tensor)}
    selective_scan(**inputs, backend=backend)
    assert all(torch.equal(inputs[k], v) for k, v in before.items())


@pytest.mark.parametrize("seq", [None, SequenceInfo.packed([30, 40]), SequenceInfo.packed([30, 40], continues=True)])
def test_summaries_combine(seq: SequenceInfo | None) -> None:
    """decay * state + contribution is what the scan does to a state, and summaries of two spans make that of both."""
    inputs = _inputs(1)
    kept = {k: inputs[k] for k in ("x", "dt", "A", "B", "dt_bias", "dt_softplus")}
    state = torch.randn(1, 20, 5)
    module = SCANS["selective"]
    decay, own = module["summarize"](**kept, seq=seq)
    _same([decay * state + own], [selective_scan(**inputs, initial_state=state, seq=seq)[1]])
    a, b, h = _linear(True, batch=1)
    for reverse in (False, True):
        decay, own = SCANS["linear"].summarize(a, b, reverse=reverse, seq=seq)
        _same([decay * h + own], [linear_scan(a, b, initial_state=h, reverse=reverse, seq=seq)[1]])
    if seq is None:
        halves = [module["summarize"](**_cut(kept, i, i + 35)) for i in (0, 35)]
        _same(module["combine"](*halves), module["summarize"](**kept))
        halves = [SCANS["linear"].summarize(a[:, i : i + 35], b[:, i : i + 35]) for i in (0, 35)]
        _same(SCANS["linear"].combine(*halves), SCANS["linear"].summarize(a, b))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(2, 20)}, "x must be"),
        ({"dt": torch.randn(2, 70, 19)}, "dt must match x"),
        ({"z": torch.randn(2, 70, 20).bfloat16()}, "z must match x"),
        ({"A": -torch.rand(19, 5)}, "A must have shape"),
        ({"B": torch.randn(2, 70, 6)}, "B must have shape"),
        ({"C": torch.randn(2, 70, 3, 5)}, "C must have shape .* ngroups dividing"),
        ({"C": torch.randn(2, 70, 2, 5), "B": torch.randn(2, 70, 4, 5)}, "same ngroups"),
        ({"D": torch.randn(21)}, "D must have shape"),
        ({"dt_bias": torch.randn(1, 20)}, "dt_bias must have shape"),
        ({"initial_state": torch.randn(1, 20, 5)}, "state must have shape"),
        ({"B": torch.randn(2, 70, 5, dtype=torch.cfloat)}, "B is complex but A is real"),
        ({"seq": SequenceInfo.packed([69])}, "seq describes"),
        ({"D": torch.randn(20, device="meta")}, "device of x"),
    ],
)
def test_bad_input_of_selective_scan(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedInput, match=message):
        selective_scan(**(_inputs() | change))


@pytest.mark.parametrize(
    ("a", "b", "options", "message"),
    [
        (torch.rand(3), torch.rand(3), {}, "b must be"),
        (torch.rand(2, 4, 5), torch.rand(2, 4, 6), {}, "does not broadcast"),
        (torch.rand(2, 4, 5), torch.ones(2, 4, 5, dtype=torch.int64), {}, "floating point"),
        (
            torch.rand(2, 4, 5),
            torch.rand(2, 4, 5),
            {"initial_state": torch.rand(2, 4)},
            "initial_state must have shape",
        ),
        (torch.rand(5), torch.rand(2, 4, 5), {"initial_state": torch.rand(2, 5) + 0j}, "initial_state is complex"),
        (torch.rand(5), torch.rand(2, 4, 5), {"seq": SequenceInfo.packed([4])}, "seq describes"),
    ],
)
def test_bad_input_of_linear_scan(a: Tensor, b: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedInput, match=message):
        linear_scan(a, b, **options)


def test_bad_state_of_step() -> None:
    now = {k: v[:, 0] if k in ("x", "dt", "B", "C", "z") else v for k, v in _inputs().items()}
    for state in (torch.zeros(2, 20, 5).double(), torch.zeros(2, 5, 20).transpose(1, 2)):
        with pytest.raises(UnsupportedInput, match="updated in place"):
            step(**now, state=state)


def test_named_row_is_never_replaced() -> None:
    with pytest.raises(BackendUnavailable, match="dtype is float64"):
        selective_scan(
            **{k: v.double() if isinstance(v, Tensor) else v for k, v in _inputs().items()}, backend="native"
        )
