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

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed; its wheels exist for Linux: pip install triton", allow_module_level=True)

KINDS = ("none", "head", "token", "channel")
SINGLE, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
# Few and small, because an interpreted operation takes tens of microseconds; the rest runs with the slow tests.
QUICK = {
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
}
SPILLS, STACK = 64, 256  # bytes per thread; an allocator that gave up leaves kilobytes


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


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def linear_attention(kind: str, dtype: torch.dtype, d_state: int, headdim: int) -> Callable[[], None]:
    from seqlib.ops.linear_attention import triton_impl as row

    def run() -> None:
        q, k, v = (meta(1, 4096, 16, width, dtype=dtype) for width in (d_state, d_state, headdim))
        g = {"head": meta(16), "token": meta(1, 4096, 16), "channel": meta(1, 4096, 16, d_state)}.get(kind)
        ids = meta(1, 4096, dtype=torch.int64) if kind == "token" else None
        _, state, kept = row.forward(q, k, v, g, None, ids, 1.0)
        row.gradients(v, state, q, k, v, g, ids, kept, 1.0, g is not None)

    return run


def delta_rule(kind: str, dtype: torch.dtype, d_state: int, headdim: int) -> Callable[[], None]:
    from seqlib.ops.delta_rule import triton_impl as row

    def run() -> None:
        q, k, v = (meta(1, 4096, 16, width, dtype=dtype) for width in (d_state, d_state, headdim))
        beta = meta(1, 4096, 16)
        g = {"token": meta(1, 4096, 16), "channel": meta(1, 4096, 16, d_state)}.get(kind)
        ids = meta(1, 4096, dtype=torch.int64) if kind == "token" else None
        _, state, kept = row.forward(q, k, v, beta, g, None, ids, 1.0)
        row.gradients(v, state, q, k, v, beta, g, ids, kept, 1.0, g is not None)

    return run


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
        assert b.shared <= compiled.SHARED[arch] and b.spilled <= SPILLS and b.stack <= STACK, b
