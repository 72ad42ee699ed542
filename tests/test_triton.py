"""Triton rows without a GPU: interpreted against the reference, and compiled for two architectures within limits."""

from __future__ import annotations

import importlib.util
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import compiled
import interpreted
import pytest
import test_ops
import torch
from torch import Tensor

from seqlib import explain

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed; its wheels exist for Linux: pip install triton", allow_module_level=True)

KINDS = ("none", "head", "token", "channel")
SINGLE, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
# Few and small, because an interpreted operation takes tens of microseconds; the rest runs with the slow tests.
QUICK = {
    "attention": {
        "window_16": SINGLE,
        "bidirectional_window": BRAIN,
        "padded_window": SINGLE,
        "mixed_window": HALF,
        "bidirectional_padded_window": SINGLE,
        "ring_full": SINGLE,
        "ring_continued": SINGLE,
    },
    "linear_attention": {
        **{f"{kind}_mixed_groups": SINGLE for kind in KINDS},
        **{f"{kind}_one_position": HALF for kind in KINDS},
        "token_odd_33": BRAIN,
        "none_packed": SINGLE,
        "channel_strong": SINGLE,
    },
    "delta_rule": {
        **{f"{kind}_mixed_groups": SINGLE for kind in ("none", "token", "channel")},
        "token_odd_33": BRAIN,
        "none_packed": HALF,
        "channel_strong": SINGLE,
    },
    "path_attention": {
        "one_token": HALF,
        "blocks": SINGLE,
        "grouped": BRAIN,
        "forget_mixed": SINGLE,
        "state_grows": SINGLE,
        "forget_state": SINGLE,
    },
    "linear_cross_entropy": {"ignored": SINGLE, "divided": BRAIN, "scaled": HALF, "capped": SINGLE},
    "rotate": {
        "halves": HALF,
        "part_neighbours": BRAIN,
        "part": SINGLE,
        "doubled": SINGLE,
        "halves_per_head": SINGLE,
        "one_token": SINGLE,
    },
    "norm": {"plain": BRAIN, "weightless": SINGLE, "gate_first": SINGLE, "gate_last": HALF, "grouped": SINGLE},
}
SPILLS, STACK = 64, 256  # bytes per thread; an allocator that gave up leaves kilobytes
# More, by kernel and d_state, where it was measured to be faster all the same or where no tile is smaller.
ALLOWED = {
    ("outputs", 128): 320,
    ("grad_qk", 128): 256,
    ("corrections", 256): 128,
    ("adjoints", 128): 192,
    ("adjoints", 256): 192,
    ("gradients", 128): 448,
}


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def interpreted_cases() -> Iterator[Any]:
    for op, quick in QUICK.items():
        for case in test_ops.CASES[op]:
            for dtype in (SINGLE, BRAIN, HALF):
                marks = () if quick.get(case.name) == dtype else pytest.mark.slow
                if not case.bench:
                    yield pytest.param(op, case.name, dtype, id=f"{op}-{case.name}-{short(dtype)}", marks=marks)


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=interpreted.start) as pool:
        yield pool


@pytest.mark.parametrize(("op", "case", "dtype"), list(interpreted_cases()))
def test_interpreted_row_equals_reference(interpreter: ProcessPoolExecutor, op: str, case: str, dtype: Any) -> None:
    """Outputs and all gradients, on packed and padded documents, with states, at odd sizes."""
    refused = interpreter.submit(interpreted.equals_reference, op, case, dtype).result(timeout=600)
    if refused:
        pytest.skip(f"outside this row: {refused}")


def test_path_attention_carries_queries_in_parts(interpreter: ProcessPoolExecutor) -> None:
    """Gradients of a few blocks of queries at a time, as long sequences take them, add up to the same."""
    assert not interpreter.submit(interpreted.in_parts, "path_attention", "forget_state").result(timeout=600)


@pytest.mark.parametrize("dtype", [pytest.param(SINGLE, marks=pytest.mark.slow), BRAIN], ids=short)
@pytest.mark.parametrize("op", list(QUICK))
def test_gate_admits_what_the_interpreter_computes(interpreter: ProcessPoolExecutor, op: str, dtype: Any, tmp_path):
    """The gate itself, which runs on devices before anything else does: right results pass."""
    case = "token_mixed_groups" if op in ("linear_attention", "delta_rule") else next(iter(QUICK[op]))
    assert interpreter.submit(interpreted.refused_by_gate, op, case, dtype, str(tmp_path)).result(timeout=600) is None


# Ops that are registered with torch, by a case that calls them all.
REGISTERED = {
    ("attention", "mixed_window"): ("attention", "attention_bwd"),
    ("delta_rule", "token_mixed_groups"): ("delta_rule", "delta_rule_bwd"),
    ("linear_attention", "token_mixed_groups"): ("linear_attention", "linear_attention_bwd"),
    ("linear_cross_entropy", "capped"): ("linear_cross_entropy",),
    ("norm", "gate_first"): ("rms_norm", "rms_norm_bwd"),
    ("path_attention", "forget_state"): ("path_attention", "path_attention_bwd", "path_inverse"),
    ("rotate", "doubled"): ("rotate", "rotate_bwd"),
}


@pytest.mark.parametrize(("op", "case"), list(REGISTERED))
def test_torch_finds_no_fault_with_registered_ops(interpreter: ProcessPoolExecutor, op: str, case: str) -> None:
    """Schemas, shapes without data, gradients, and tracing with sizes that are not known: torch.compile needs all."""
    names = interpreter.submit(interpreted.checked_by_torch, op, case).result(timeout=600)
    assert tuple(names) == REGISTERED[op, case]


@pytest.mark.parametrize(
    ("op", "case"),
    [
        ("attention", "window_16"),
        ("delta_rule", "token_odd_33"),
        ("linear_attention", "token_odd_33"),
        ("linear_cross_entropy", "capped"),
        ("norm", "gate_first"),
        ("path_attention", "forget"),
        ("rotate", "halves"),
    ],
)
def test_a_row_is_one_graph(interpreter: ProcessPoolExecutor, op: str, case: str) -> None:
    interpreter.submit(interpreted.traced_is_the_same, op, case).result(timeout=600)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def tokens(kind: str, dtype: torch.dtype, d_state: int, headdim: int) -> tuple[tuple[int, int], list[Tensor]]:
    """seqlen and nheads, and q, k, v; one of each where there is no decay, since Triton makes constants of ones."""
    length, heads = (1, 1) if kind == "none" else (4096, 16)
    return (length, heads), [meta(1, length, heads, width, dtype=dtype) for width in (d_state, d_state, headdim)]


def linear_attention(kind: str, dtype: torch.dtype, d_state: int, headdim: int) -> Callable[[], None]:
    from seqlib.ops.linear_attention import triton_impl as row

    def run() -> None:
        (length, heads), (q, k, v) = tokens(kind, dtype, d_state, headdim)
        gates = {"head": (heads,), "token": (1, length, heads), "channel": (1, length, heads, d_state)}
        g = meta(*gates[kind]) if kind in gates else None
        ids = meta(1, length, dtype=torch.int64) if kind == "token" else None
        _, state, kept = row.forward(q, k, v, g, None, ids, 1.0)
        row.gradients(v, state, q, k, v, g, ids, kept, 1.0, g is not None)

    return run


def delta_rule(kind: str, dtype: torch.dtype, d_state: int, headdim: int) -> Callable[[], None]:
    from seqlib.ops.delta_rule import triton_impl as row

    def run() -> None:
        (length, heads), (q, k, v) = tokens(kind, dtype, d_state, headdim)
        gates = {"token": (1, length, heads), "channel": (1, length, heads, d_state)}
        beta, g = meta(1, length, heads), meta(*gates[kind]) if kind in gates else None
        ids = meta(1, length, dtype=torch.int64) if kind == "token" else None
        _, state, kept = row.forward(q, k, v, beta, g, None, ids, 1.0)
        row.gradients(v, state, q, k, v, beta, g, ids, kept, 1.0, g is not None)

    return run


def norm(order: str, dtype: torch.dtype, group_size: int, groups: int) -> Callable[[], None]:
    from seqlib.ops.norm import triton_impl as row

    def run() -> None:
        x, weight = meta(2, 2048, groups * group_size, dtype=dtype), meta(groups * group_size)
        gate, last = None if order == "plain" else x, order == "last"
        y, scales = row.forward(x, weight, gate, last, group_size, 1e-5)
        row.gradients(y, x, weight, gate, scales, last, group_size, True)

    return run


def rotate(pairs: str, dtype: torch.dtype, headdim: int, angles: int) -> Callable[[], None]:
    from seqlib.ops.rotate import triton_impl as row

    def run() -> None:
        heads = (16, 16 if pairs == "doubled" else 4)
        q, k = (meta(8192, n, headdim, dtype=dtype) for n in heads)
        theta = meta(16, angles) if pairs == "doubled" else meta(angles)
        positions = meta(4, 2048, dtype=torch.int64)
        row.gradients(*row.forward(q, k, theta, positions, pairs), q, k, theta, positions, pairs)

    return run


def attention(order: str, dtype: torch.dtype, headdim: int, headdim_v: int) -> Callable[[], None]:
    from seqlib.ops.attention import triton_impl as row

    def run() -> None:
        sizes = ((8, headdim), (2, headdim), (2, headdim_v))
        q, k, v = (meta(2, 4096, heads, width, dtype=dtype) for heads, width in sizes)
        begin = meta(2, dtype=torch.int64)
        y, peaks = row.forward(q, k, v, begin, None, 1024, order == "causal", 0.1)
        row.gradients(y, q, k, v, begin, None, y, peaks, 1024, order == "causal", 0.1)

    return run


def path_attention(past: str, dtype: torch.dtype, headdim: int, headdim_v: int) -> Callable[[], None]:
    from seqlib.ops import triton_common as common
    from seqlib.ops.path_attention import triton_impl as row

    def run() -> None:
        stored, front = common.products(dtype).stored, 4 if past == "state" else 0
        chunk = row._plan(meta(headdim), meta(headdim_v, dtype=dtype)).chunk
        blocks, shape = 2048 // chunk, (2, 4)
        q, k = (
            meta(*shape, n, rows, headdim, dtype=stored) for n, rows in ((blocks, 2 * chunk), (front + blocks, chunk))
        )
        v, w = meta(*k.shape[:4], headdim_v, dtype=dtype), meta(*k.shape)
        local, sums = meta(*q.shape[:4], chunk), meta(*k.shape[:3], 2, chunk, dtype=torch.float64)
        row.inverse(w, meta(*w.shape[:4]))
        y, peaks = row.forward(q, k, v, w, w, local, sums, 0.1)
        row.gradients(y, q, k, v, w, w, local, sums, y, peaks, 0.1)

    return run


def cross_entropy(shape: str, dtype: torch.dtype, words: int, rows: int) -> Callable[[], None]:
    from seqlib.ops.linear_cross_entropy import triton_impl as row

    cap = 30.0 if shape == "capped" else None
    targets, count = meta(rows, dtype=torch.int64), meta(dtype=torch.int64)
    return lambda: [row.losses(meta(rows, words, dtype=dtype), targets, count, -100, 1.0, cap, True)]


# What is launched at sizes of published models; quick ones first.
COMPILED: dict[str, tuple[Callable[[], None], bool]] = {
    f"{op.__name__}-{kind}-{short(dtype)}-{n}x{p}": (op(kind, dtype, n, p), quick)
    for op, kind, dtype, n, p, quick in (
        (linear_attention, "token", BRAIN, 128, 64, True),
        (linear_attention, "head", BRAIN, 128, 128, False),
        (linear_attention, "channel", BRAIN, 64, 64, True),
        (linear_attention, "token", SINGLE, 64, 64, True),
        (linear_attention, "none", BRAIN, 64, 64, False),
        (linear_attention, "head", BRAIN, 256, 128, False),
        (linear_attention, "token", BRAIN, 256, 256, False),
        (linear_attention, "channel", BRAIN, 128, 128, False),
        (linear_attention, "channel", SINGLE, 128, 128, False),
        (linear_attention, "token", HALF, 128, 64, False),
        (linear_attention, "token", SINGLE, 256, 256, False),
        (delta_rule, "token", BRAIN, 128, 128, True),
        (delta_rule, "none", BRAIN, 64, 64, False),
        (delta_rule, "channel", BRAIN, 128, 128, False),
        (delta_rule, "token", BRAIN, 256, 256, False),
        (delta_rule, "token", SINGLE, 128, 128, False),
        (delta_rule, "channel", SINGLE, 64, 64, False),
        (delta_rule, "token", HALF, 128, 128, False),
        (attention, "causal", BRAIN, 128, 128, True),
        (attention, "causal", SINGLE, 128, 128, False),
        (attention, "both", HALF, 64, 64, False),
        (path_attention, "none", BRAIN, 64, 64, True),
        (path_attention, "state", BRAIN, 128, 128, True),
        (path_attention, "none", SINGLE, 64, 64, False),
        (path_attention, "state", SINGLE, 128, 128, False),
        (path_attention, "state", HALF, 64, 64, False),
        (cross_entropy, "capped", BRAIN, 50257, 4096, True),
        (rotate, "halves", BRAIN, 128, 64, True),
        (rotate, "neighbours", SINGLE, 64, 16, True),
        (rotate, "doubled", BRAIN, 128, 128, True),
        (norm, "first", BRAIN, 5120, 1, True),
        (norm, "last", BRAIN, 128, 16, True),
        (norm, "first", SINGLE, 8192, 1, False),
    )
}


@pytest.mark.parametrize("arch", compiled.SHARED)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if quick else pytest.mark.slow) for n, (_, quick) in COMPILED.items()]
)
def test_compiles_within_limits(name: str, arch: int) -> None:
    """Every kernel of the forward and backward pass: shared memory that a block can have, next to no spills."""
    built = compiled.launches(arch, COMPILED[name][0])
    assert built
    for b in built:
        spills = ALLOWED.get((b.kernel, b.plan.get("N")), SPILLS)
        assert b.shared <= compiled.SHARED[arch] and b.spilled <= spills and b.stack <= max(spills, STACK), b


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Any:
    """The library's Triton helpers with an empty table, kept in a folder of the test."""
    from seqlib.ops import triton_common as common

    monkeypatch.setattr(common, "SHIPPED", tmp_path / "none.json")
    monkeypatch.setenv("SEQLIB_CACHE", str(tmp_path))
    monkeypatch.setattr(common, "_live", {})
    common._table.cache_clear()
    yield common
    common._table.cache_clear()


def judge(common: Any, *plans: tuple[float, ...]) -> tuple[Any, int]:
    """The verdict on plans that are off by their first number, and how many trials it took."""
    trials = 0

    def row(x: Tensor) -> Tensor:
        return x * (1 + common.chosen("op", plans)[0])

    def trial() -> str:
        nonlocal trials
        trials += 1
        return common.trial(row, lambda x: x * 1, {"x": torch.linspace(-1, 1, 50)})

    return common.admit("op", plans, trial), trials


def test_a_wrong_configuration_is_never_used(table: Any) -> None:
    """The first candidate that agrees with the truth is admitted and remembered, also by later processes."""
    verdict, trials = judge(table, (0.1, 4), (1e-9, 8), (0.0, 2))
    assert verdict.refusal is None and "1e-09 8" in verdict.note and trials == 2
    table._table.cache_clear()
    table._live.clear()
    assert judge(table, (0.1, 4), (1e-9, 8), (0.0, 2))[1] == 0
    assert table.chosen("op", [(0.1, 4), (1e-9, 8)]) == (1e-9, 8)


def test_a_row_without_a_right_configuration_is_refused_with_its_errors(table: Any) -> None:
    verdict, trials = judge(table, (0.1, 4), (float("nan"), 8))
    assert trials == 2 and "output 0 is off by 1.0e-01" in verdict.refusal and "nan" in verdict.refusal


def test_results_that_move_are_a_fault(table: Any) -> None:
    moves = iter(range(9))
    fault = table.trial(lambda x: x + 1e-7 * next(moves), lambda x: x * 1, {"x": torch.ones(3)})
    assert fault == "output 0 differs from run to run"


@pytest.mark.parametrize("op", QUICK)
def test_explain_says_why_the_row_is_passed_over(op: str) -> None:
    case = next(c for c in test_ops.CASES[op] if not c.bench)
    lines = explain(op, **case.inputs(torch.float32)).splitlines()
    assert any(line.split()[0] == "triton" and "device is cpu; it runs on cuda" in line for line in lines)


def gpu_cases() -> Iterator[Any]:
    for op in QUICK:
        for case in test_ops.CASES[op]:
            for dtype in (SINGLE, BRAIN, HALF):
                if not case.bench:
                    yield pytest.param(op, case, dtype, id=f"{op}-{case.name}-{short(dtype)}")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("op", "case", "dtype"), list(gpu_cases()))
def test_row_equals_reference_on_the_device(op: str, case: Any, dtype: torch.dtype) -> None:
    """The same grid, in poisoned memory, and bit for bit the same from run to run."""
    inputs = case.inputs(dtype, "cuda", requires_grad=True)
    impl = next(i for i in test_ops.OPS[op].impls if i.name == "triton")
    reason = impl.limits and impl.limits(test_ops.OPS[op].facts(**inputs))
    if reason or impl.refuses & test_ops.OPS[op].facts(**inputs).features:
        pytest.skip(f"outside this row: {reason or impl.refuses}")
    test_ops.compare(test_ops.OPS[op], impl, inputs, dtype)
    first, second = (test_ops._run(test_ops.OPS[op], inputs, impl.form, impl.name) for _ in range(2))
    for a, b in zip((*first[0], *first[1].values()), (*second[0], *second[1].values())):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_offsets_beyond_two_to_the_31_elements() -> None:
    """Rows of a batch that lie 2^31 elements and more apart are read where they are."""
    from seqlib.ops import linear_attention as op

    wide = torch.zeros(2, 1 << 21, 1088, dtype=BRAIN, device="cuda")  # 2.1e9 elements from row to row
    q, k, v = (wide[:, -130:, 64 * i : 64 * i + 64].unflatten(2, (1, 64)) for i in range(3))
    for t in (q, k, v):
        t.copy_(torch.randn(t.shape, device="cuda"))
    assert wide.stride(0) > 1 << 31
    got, want = (op(q, k, v, backend=b)[0].float() for b in ("triton", "torch"))
    assert float((got - want).norm() / want.norm()) < 6e-3
